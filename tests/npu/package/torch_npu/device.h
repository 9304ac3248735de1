// Devices, memory, streams and random numbers of the simulated NPU.

#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// ---- devices -------------------------------------------------------------------------------------------------------

c10::DeviceIndex device_count() {
  static const c10::DeviceIndex count = [] {
    const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (visible == nullptr) return c10::DeviceIndex(8);
    const std::string list(visible);
    return c10::DeviceIndex(list.empty() ? 0 : 1 + std::count(list.begin(), list.end(), ','));
  }();
  return count;
}

thread_local c10::DeviceIndex current = 0;

void set_current(c10::DeviceIndex index) {
  const bool exists = index >= 0 && index < device_count();
  TORCH_CHECK(exists, "npu:", int(index), " does not exist; there are ", int(device_count()));
  current = index;
}

// ---- memory, counted by device -------------------------------------------------------------------------------------

struct Counter {
  int64_t now = 0, peak = 0;
};

struct NpuAllocator final : c10::Allocator {
  std::mutex mutex;
  std::unordered_map<void*, std::pair<c10::DeviceIndex, int64_t>> blocks;
  std::unordered_map<c10::DeviceIndex, Counter> counters;

  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? c10::alloc_cpu(bytes) : nullptr;
    if (data) {
      std::lock_guard<std::mutex> guard(mutex);
      blocks[data] = {current, int64_t(bytes)};
      auto& counter = counters[current];
      counter.now += int64_t(bytes);
      counter.peak = std::max(counter.peak, counter.now);
    }
    return {data, data, &release, c10::Device(kNpu, current)};
  }
  static void release(void* data);
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

NpuAllocator& allocator() {
  static auto* instance = new NpuAllocator;
  return *instance;
}

void NpuAllocator::release(void* data) {
  if (data == nullptr) return;
  auto& self = allocator();
  std::lock_guard<std::mutex> guard(self.mutex);
  const auto block = self.blocks.find(data);
  self.counters[block->second.first].now -= block->second.second;
  self.blocks.erase(block);
  c10::free_cpu(data);
}

// ---- streams and events: everything is done when the call returns --------------------------------------------------

struct NpuGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kNpu; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto old = current;
    set_current(device.index());
    return {kNpu, old};
  }
  c10::Device getDevice() const override { return {kNpu, current}; }
  void setDevice(c10::Device device) const override { set_current(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return device_count(); }

  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getStream(device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}

  using Clock = std::chrono::steady_clock;
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    const auto span = *static_cast<Clock::time_point*>(to) - *static_cast<Clock::time_point*>(from);
    return std::chrono::duration<double, std::milli>(span).count();
  }
};

// ---- random numbers: the CPU's generator under the device's name ---------------------------------------------------

struct NpuGenerator final : at::CPUGeneratorImpl {
  explicit NpuGenerator(c10::DeviceIndex index) {
    device_ = c10::Device(kNpu, index);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<NpuGenerator>(index < 0 ? current : index);
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>;
    for (c10::DeviceIndex i = 0; i < device_count(); ++i) made->push_back(new_generator(i));
    return made;
  }();
  return generators->at(index < 0 ? current : index);
}

struct NpuHooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return device_count(); }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { set_current(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto old = current;
    set_current(index);
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override { return new_generator(index); }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace
