// Collectives of the simulated NPU: gloo over the same bytes, with HCCL's refusals.

#pragma once

#include "operators.h"

#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace {

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
