// A simulated NPU: PyTorch's PrivateUse1 device over host memory, and an `hccl` backend over gloo.

#include "collectives.h"

#include <torch/csrc/utils/pybind.h>

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
