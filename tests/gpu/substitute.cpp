// A second device in the CPU's memory, which behaves as a GPU does towards whoever forgets on which device a tensor is.
//
// Every kernel is the CPU's, and an operation refuses tensors of different devices. Copies between the devices are real.

#include <ATen/EmptyTensor.h>
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

using at::Tensor;
constexpr auto KIND = c10::DeviceType::PrivateUse1;

struct OwnAllocator final : c10::Allocator {
  static void release(void* memory) { free(memory); }
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    return {memory, memory, &release, c10::Device(KIND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};
static OwnAllocator allocator;
REGISTER_ALLOCATOR(KIND, &allocator);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return KIND; }
  c10::Device exchangeDevice(c10::Device) const override { return {KIND, 0}; }
  c10::Device getDevice() const override { return {KIND, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, c10::Device(KIND, 0)); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeEvent(void*) const override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  bool isPinnedPtr(const void*) const override { return false; }
};

static Tensor on_cpu(const Tensor& tensor) {
  return at::from_blob(tensor.storage().mutable_data() ? static_cast<char*>(tensor.storage().mutable_data()) +
          tensor.storage_offset() * tensor.element_size() : nullptr, tensor.sizes(), tensor.strides(),
      tensor.options().device(at::kCPU).requires_grad(false));
}

static Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
static bool may_wait = true;
static thread_local bool inside = false;  // of a kernel, whose copies are not the program's
static void wait(const std::string& what) {
  TORCH_CHECK(may_wait || inside, what, " makes the host wait for the device");
}
static Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  if (self.device() != to.device() && !non_blocking) wait("a copy");
  Tensor source = self.is_cpu() ? self : on_cpu(self), target = to.is_cpu() ? to : on_cpu(to);
  target.copy_(source);
  return to;
}
static Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  const_cast<Tensor&>(to).resize_(self.sizes());
  return copy_from(self, to, false);
}
static at::Scalar local_scalar(const Tensor& self) { wait("a number"); return at::_local_scalar_dense(on_cpu(self)); }
static Tensor& set_storage(Tensor& result, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
  result.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  result.unsafeGetTensorImpl()->set_storage_offset(offset);
  at::native::resize_impl_cpu_(result.unsafeGetTensorImpl(), size,
      stride.data() ? std::optional<at::IntArrayRef>(stride) : std::nullopt);
  return result;
}
static Tensor& set_sym(Tensor& result, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return set_storage(result, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
static Tensor& set_whole(Tensor& result, at::Storage storage) {
  int64_t count = static_cast<int64_t>(storage.nbytes() / result.dtype().itemsize());
  return set_storage(result, std::move(storage), 0, {count}, {});
}
static const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  at::native::resize_impl_cpu_(self.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt);
  return self;
}
static Tensor as_strided(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt);
}
static Tensor view(const Tensor& self, c10::SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }
static Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

static Tensor back(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  bool before = std::exchange(inside, true);
  Tensor made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(KIND)).copy_(tensor);
  inside = before;
  return made;
}
static std::optional<Tensor> maybe_on_cpu(const std::optional<Tensor>& tensor) {
  return tensor && tensor->defined() ? std::optional<Tensor>(on_cpu(*tensor)) : std::nullopt;
}
static void same(const Tensor& one, const Tensor& other) {
  TORCH_CHECK(one.device() == other.device(), "Expected all tensors to be on the same device, but found the CPU in a convolution");
}
static Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups) {
  same(input, weight);
  return back(at::convolution(on_cpu(input), on_cpu(weight), maybe_on_cpu(bias), stride, padding, dilation, transposed, output_padding, groups));
}
static std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  same(input, weight);
  int64_t channels = weight.size(0);
  auto found = at::convolution_backward(on_cpu(grad), on_cpu(input), on_cpu(weight), at::OptionalIntArrayRef(at::IntArrayRef(channels)),
      stride, padding, dilation, transposed, output_padding, groups, mask);
  return {back(std::get<0>(found)), back(std::get<1>(found)), back(std::get<2>(found))};
}
static int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
    std::optional<double>, bool) { return 0; }

static const std::set<std::string> WAITING = {"aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::is_nonzero", "aten::_linalg_check_errors", "aten::bincount"};

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  // operands with dimensions must be on one device; indices, and numbers as tensors, may be on the CPU, as for CUDA
  std::string name = op.schema().name();
  if (WAITING.count(name)) wait(name);
  bool indexed = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0 || name == "aten::_unsafe_index";
  if (indexed)  // by truth values: their number is not known
    for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size()))
      if (value.isOptionalTensorList())
        for (const auto& each : value.toOptionalTensorList()) {
          std::optional<Tensor> one = each;
          if (one && one->defined() && one->scalar_type() == at::kBool) wait(name);
        }
  bool own = false, other = false;
  auto see = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == KIND) own = true; else if (tensor.dim() > 0) other = true;
  };
  auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  for (const auto& value : arguments) {
    if (value.isTensor()) see(value.toTensor());
    else if (value.isTensorList()) for (const auto& each : value.toTensorVector()) see(each);
    else if (value.isOptionalTensorList() && !indexed)
      for (const auto& each : value.toOptionalTensorList()) { std::optional<Tensor> one = each; if (one) see(*one); }
  }
  TORCH_CHECK(!(own && other), "Expected all tensors to be on the same device, but found the CPU and the substitute in ", name);
  bool before = std::exchange(inside, true);
  try { at::native::cpu_fallback(op, stack); } catch (...) { inside = before; throw; }
  inside = before;
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage_storage_offset", set_sym);
  m.impl("set_.source_Storage", set_whole);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("_fused_sdp_choice", plain_attention);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("let_wait", [](bool may) { may_wait = may; });
}
