// A simulated NPU: PyTorch's PrivateUse1 device over host memory, and an `hccl` backend over gloo.
//
// Factories, copies and views are registered here; every other operator runs on the CPU through a boxed fallback that
// first refuses what a real device refuses: operands on different devices, and random generators of another device.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

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

// ---- tensors -------------------------------------------------------------------------------------------------------

// The same bytes as a CPU tensor: what the simulation's own copies and collectives read and write.
at::Tensor host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(
      const_cast<void*>(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
      [storage = tensor.storage()](void*) {}, tensor.options().device(at::kCPU), at::Device(at::kCPU));
}

c10::DeviceIndex index_of(std::optional<at::Device> device) {
  return device && device->has_index() ? device->index() : current;
}

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(at::Device(kNpu, index_of(device)));
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator(), keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(at::Device(kNpu, index_of(device)));
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator(), keys, c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  host(to).copy_(host(from));
  return to;
}

const at::Tensor& resize_to(const at::Tensor& tensor, at::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(tensor.device());
  return at::native::resize_(tensor, size, format);
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.sizes() != from.sizes()) resize_to(to, from.sizes(), std::nullopt);
  return copy_from(from, to, false);
}

at::Tensor to_copy(
    const at::Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> device, std::optional<bool> pinned, bool non_blocking,
    std::optional<at::MemoryFormat> format) {
  if (dtype == at::kDouble && !layout && !device) {
    TORCH_WARN_ONCE("npu: a cast to double on the device gives float");  // as torch_npu does, with its own warning
    dtype = at::kFloat;
  }
  return at::native::_to_copy(self, dtype, layout, device, pinned, non_blocking, format);
}

at::Scalar local_scalar(const at::Tensor& tensor) { return at::native::_local_scalar_dense_cpu(host(tensor)); }

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  const int64_t length = int64_t(storage.nbytes() / tensor.dtype().itemsize());
  return at::native::set_storage_cpu_(tensor, std::move(storage), 0, {length}, {1});
}

at::Tensor& set_tensor(at::Tensor& tensor, const at::Tensor& from) {
  return at::native::set_storage_cpu_(tensor, from.storage(), from.storage_offset(), from.sizes(), from.strides());
}

bool same_kind(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& tensor) {
    return tensor.layout() == at::kStrided && (tensor.is_cpu() || tensor.device().type() == kNpu);
  };
  return dense(self) && dense(from);  // lets `parameter.data = tensor` cross devices, so Module.to keeps its parameters
}

int64_t attention_by_matmul(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, double, bool,
    std::optional<double>, bool) {
  return 0;  // sdp::SDPBackend::math
}

void record_stream(at::Tensor&, c10::Stream) {}

// ---- every other operator ------------------------------------------------------------------------------------------

void check_device(const at::Tensor& tensor, std::optional<at::Device>& common, const c10::OperatorHandle& op) {
  if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0)) return;  // scalars travel, as on every accelerator
  if (!common) common = tensor.device();
  TORCH_CHECK(
      tensor.device() == *common, "Expected all tensors to be on the same device, but found at least two devices, ",
      *common, " and ", tensor.device(), "! (in ", op.schema().operator_name(), ")");
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto first = stack->size() - arguments.size();
  const auto& name = op.schema().name();
  const bool indexing = name.rfind("aten::index", 0) == 0 || name == "aten::_index_put_impl_";
  std::optional<at::Device> common;
  at::Generator device_generator, cpu_generator;
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      check_device(value.toTensor(), common, op);
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) check_device(tensor, common, op);
    } else if (value.isOptionalTensorList() && !indexing) {  // indices may lie on the CPU, as on every accelerator
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        if (tensor) check_device(*tensor, common, op);
    } else if (arguments[i].type()->str() == "Generator?") {
      device_generator = value.isNone() ? default_generator(common ? common->index() : current) : value.toGenerator();
      TORCH_CHECK(
          device_generator.device().type() == kNpu, "Expected a 'npu' generator but found ", device_generator.device());
      cpu_generator = at::detail::createCPUGenerator();
      cpu_generator.set_state(device_generator.get_state());
      value = cpu_generator;
    }
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  if (cpu_generator.defined()) device_generator.set_state(cpu_generator.get_state());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("unfold", at::native::unfold);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_to);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_to_copy", to_copy);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("_has_compatible_shallow_copy_type", same_kind);
  m.impl("_fused_sdp_choice", attention_by_matmul);
  m.impl("record_stream", record_stream);
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, NpuGuard);
REGISTER_ALLOCATOR(kNpu, &allocator());

// ---- collectives: gloo over the same bytes, with HCCL's refusals ---------------------------------------------------

struct Hccl final : c10d::Backend {
  using Tensors = std::vector<at::Tensor>;
  using Work = c10::intrusive_ptr<c10d::Work>;

  explicit Hccl(c10::intrusive_ptr<c10d::Backend> gloo)
      : c10d::Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "hccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto bytes = lower(tensors);
    return gloo_->broadcast(bytes, options);
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto bytes = reducible(tensors);
    return gloo_->allreduce(bytes, options);
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    auto bytes = reducible(tensors);
    return gloo_->allreduce_coalesced(bytes, options);
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto bytes = reducible(tensors);
    return gloo_->reduce(bytes, options);
  }
  Work allgather(std::vector<Tensors>& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = lower(outputs);
    auto from = lower(inputs);
    return gloo_->allgather(to, from, options);
  }
  Work _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = lower(output), from = lower(input);
    return gloo_->_allgather_base(to, from, options);
  }
  Work allgather_into_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = lower(outputs), from = lower(inputs);
    return gloo_->allgather_into_tensor_coalesced(to, from, options);
  }
  Work reduce_scatter(
      Tensors& outputs, std::vector<Tensors>& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = reducible(outputs);
    auto from = lower(inputs);
    return gloo_->reduce_scatter(to, from, options);
  }
  Work _reduce_scatter_base(at::Tensor& output, at::Tensor& input, const c10d::ReduceScatterOptions& options) override {
    auto to = reducible(output), from = reducible(input);
    return gloo_->_reduce_scatter_base(to, from, options);
  }
  Work reduce_scatter_tensor_coalesced(
      Tensors& outputs, Tensors& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = reducible(outputs), from = reducible(inputs);
    return gloo_->reduce_scatter_tensor_coalesced(to, from, options);
  }
  Work barrier(const c10d::BarrierOptions&) override {
    c10d::BarrierOptions options;  // the caller's device ids are NPUs, gloo has none
    return gloo_->barrier(options);
  }

 private:
  static at::Tensor lower(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.device().type() == kNpu, "hccl: tensors must be on an NPU, got ", tensor.device());
    TORCH_CHECK(tensor.is_contiguous(), "hccl: tensors must be contiguous");
    return host(tensor);
  }
  static at::Tensor reducible(const at::Tensor& tensor) {
    const auto type = tensor.scalar_type();
    const bool supported = type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kChar ||
        type == at::kShort || type == at::kInt || type == at::kLong || type == at::kByte || type == at::kBool;
    TORCH_CHECK(supported, "hccl: no reduction of ", type);
    return lower(tensor);
  }
  static Tensors lower(const Tensors& tensors) { return map(tensors, [](const at::Tensor& t) { return lower(t); }); }
  static Tensors reducible(const Tensors& tensors) {
    return map(tensors, [](const at::Tensor& t) { return reducible(t); });
  }
  static std::vector<Tensors> lower(const std::vector<Tensors>& lists) {
    std::vector<Tensors> lowered;
    for (const auto& list : lists) lowered.push_back(lower(list));
    return lowered;
  }
  template <typename F>
  static Tensors map(const Tensors& tensors, F f) {
    Tensors mapped;
    for (const auto& tensor : tensors) mapped.push_back(f(tensor));
    return mapped;
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  static NpuHooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("device_count", [] { return int(device_count()); });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int index) { set_current(c10::DeviceIndex(index)); });
  m.def("default_generator", [](int index) { return default_generator(c10::DeviceIndex(index)); });
  m.def("memory", [](int index) {
    std::lock_guard<std::mutex> guard(allocator().mutex);
    const auto& counter = allocator().counters[c10::DeviceIndex(index)];
    return std::make_pair(counter.now, counter.peak);
  });
  m.def("reset_peak_memory", [](int index) {
    std::lock_guard<std::mutex> guard(allocator().mutex);
    auto& counter = allocator().counters[c10::DeviceIndex(index)];
    counter.peak = counter.now;
  });
  py::class_<Hccl, c10::intrusive_ptr<Hccl>, c10d::Backend>(m, "Hccl")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>());
}
