// Factories, copies and views of the simulated NPU; every other operator runs on the CPU through a boxed fallback that
// first refuses what a real device refuses: operands on different devices, random generators of another device.

#pragma once

#include "device.h"

#include <ATen/EmptyTensor.h>
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
#include <torch/library.h>

namespace {

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

}  // namespace
