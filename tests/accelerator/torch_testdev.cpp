// A device for tests: PyTorch's PrivateUse1, over main memory, with two devices.
//
// An operator runs in three steps: all its tensors are checked to be on one device, they are copied
// to CPU tensors, and PyTorch's CPU kernel runs on these. A tensor of the CPU or of the other
// device raises, except a CPU tensor without dimensions that is only read, as on real devices.
// Random numbers come from a generator of the device, so that its state has to be saved too. Two
// dtypes and some operators are missing, as on many devices.
// torch_testdev.py gives it the name "testdev" and the functions that torch.cuda has.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr c10::DeviceIndex kCount = 2;
thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex checked(c10::DeviceIndex index) {
  TORCH_CHECK(index < kCount, "there is no testdev:", static_cast<int>(index));
  return index < 0 ? current : index;
}

// ---- memory

std::array<std::atomic<int64_t>, kCount> in_use{}, peak{};

struct Block {
  void* memory;
  int64_t bytes;
  c10::DeviceIndex device;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  in_use[block->device] -= block->bytes;
  std::free(block->memory);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const auto device = current;
    void* memory = bytes ? std::malloc(bytes) : nullptr;
    TORCH_CHECK(memory || !bytes, "testdev is out of memory");
    const int64_t now = in_use[device] += static_cast<int64_t>(bytes);
    if (now > peak[device]) peak[device] = now;
    auto* block = new Block{memory, static_cast<int64_t>(bytes), device};
    return {memory, block, &release, c10::Device(kType, device)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Allocator allocator;

// ---- the present device. Everything is done when a call returns, so that one stream is enough.

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override { return {kType, current}; }
  void setDevice(c10::Device device) const override { current = checked(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override {
    const auto index = device.index() < 0 ? current : device.index();
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, index));
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kCount; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const {}  // not every version has it
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers: a CPU generator for each device

std::array<at::Generator, kCount>& generators() {
  static std::array<at::Generator, kCount> made{
      at::detail::createCPUGenerator(), at::detail::createCPUGenerator()};
  return made;
}

// While it lives, CPU kernels draw from the device's generator.
class Drawing {
 public:
  explicit Drawing(c10::DeviceIndex device)
      : generator_(generators()[device]), cpu_(at::detail::getDefaultCPUGenerator()) {
    before_ = read(cpu_);
    write(cpu_, read(generator_));
  }
  ~Drawing() {
    write(generator_, read(cpu_));
    write(cpu_, before_);
  }
  static at::Tensor read(at::Generator generator) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    return generator.get_state();
  }
  static void write(at::Generator generator, const at::Tensor& state) {
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(state);
  }

 private:
  at::Generator generator_, cpu_;
  at::Tensor before_;
};

// ---- hooks, through which newer versions of PyTorch ask for the device

struct Hooks final : at::PrivateUse1HooksInterface {
  // No `override`: not every version has all of these.
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return true; }
  void init() const {}
  c10::DeviceIndex deviceCount() const { return kCount; }
  c10::DeviceIndex getCurrentDevice() const { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const { current = checked(index); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const {
    const auto before = current;
    setCurrentDevice(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const {
    return exchangeDevice(index);
  }
};

// ---- operators

c10::Device chosen(std::optional<c10::Device> device) {
  return {kType, checked(device ? device->index() : -1)};
}

// As some real devices do, it lacks two dtypes.
at::ScalarType known(std::optional<at::ScalarType> type) {
  const auto chosen = c10::dtype_or_default(type);
  TORCH_CHECK_TYPE(
      chosen != at::kDouble && chosen != at::kHalf, "testdev does not know the dtype ", chosen);
  return chosen;
}

at::Tensor empty(
    at::IntArrayRef size,
    std::optional<at::ScalarType> type,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(chosen(device));
  return at::detail::empty_generic(
      size, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      known(type), format);
}

at::Tensor empty_strided(
    at::IntArrayRef size,
    at::IntArrayRef stride,
    std::optional<at::ScalarType> type,
    std::optional<at::Layout>,
    std::optional<c10::Device> device,
    std::optional<bool>) {
  c10::OptionalDeviceGuard guard(chosen(device));
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      known(type));
}

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(),
      tensor.options().device(c10::kCPU).requires_grad(false));
}

// The only way between the devices and main memory.
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool) {
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) to.resize_(self.sizes());
  return copy_from(self, to, false);
}

class SameDevice {
 public:
  explicit SameDevice(std::string name) : name_(std::move(name)) {}

  void check(const c10::IValue& value, bool written) {
    if (value.isTensor()) {
      check(value.toTensor(), written);
    } else if (value.isList()) {
      for (const auto& item : value.toListRef()) check(item, written);
    } else if (value.isDevice() && value.toDevice().type() == kType && !found_) {
      found_ = chosen(value.toDevice());
    }
  }

  c10::DeviceIndex index() const { return found_ ? found_->index() : current; }

 private:
  void check(const at::Tensor& tensor, bool written) {
    if (!tensor.defined() || (tensor.is_cpu() && tensor.dim() == 0 && !written)) return;
    if (tensor.device().type() == kType && !found_) found_ = tensor.device();
    TORCH_CHECK(
        tensor.device().type() == kType && tensor.device() == *found_, name_,
        ": expected all tensors to be on one testdev device, but found ", tensor.device());
  }

  std::string name_;
  std::optional<c10::Device> found_;
};

// As on real devices that are not CUDA's, these operators have no kernel.
constexpr std::array<const char*, 2> kMissing{"aten::_fused_adam_", "aten::segment_reduce"};

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& name = op.schema().name();
  TORCH_CHECK_NOT_IMPLEMENTED(
      std::find(kMissing.begin(), kMissing.end(), name) == kMissing.end(), "testdev has no ", name);
  SameDevice same(name);
  auto values = torch::jit::last(*stack, arguments.size());
  // A tensor of the device decides, wherever it stands: look at the arguments twice.
  for (int round = 0; round < 2; ++round) {
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = arguments[i].alias_info();
      const bool is_device = values[i].isTensor() && values[i].toTensor().defined() &&
          values[i].toTensor().device().type() == kType;
      if (round == 1 || is_device) same.check(values[i], alias && alias->isWrite());
    }
  }
  std::optional<Drawing> drawing;
  if (op.hasTag(at::Tag::nondeterministic_seeded)) drawing.emplace(same.index());
  at::native::cpu_fallback(op, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", static_cast<at::Tensor (*)(const at::Tensor&, at::IntArrayRef)>(&at::native::view));
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &at::native::resize_);
  m.impl("set_.source_Storage", static_cast<at::Tensor& (*)(at::Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
}

TORCH_LIBRARY(testdev, m) {
  m.def("device_count() -> int", [] { return static_cast<int64_t>(kCount); });
  m.def("current_device() -> int", [] { return static_cast<int64_t>(current); });
  m.def("set_device(int index) -> ()", [](int64_t index) { current = checked(index); });
  m.def("memory(int index) -> int[]", [](int64_t index) {
    return std::vector<int64_t>{in_use[checked(index)], peak[checked(index)]};
  });
  m.def("reset_peak(int index) -> ()", [](int64_t index) {
    peak[checked(index)] = in_use[checked(index)].load();
  });
  m.def("get_rng_state(int index) -> Tensor", [](int64_t index) {
    return Drawing::read(generators()[checked(index)]);
  });
  m.def("set_rng_state(Tensor state, int index) -> ()", [](at::Tensor state, int64_t index) {
    Drawing::write(generators()[checked(index)], state);
  });
  m.def("manual_seed(int seed, int index) -> ()", [](int64_t seed, int64_t index) {
    auto generator = generators()[checked(index)];
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(seed);
  });
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kType, &allocator);
}
