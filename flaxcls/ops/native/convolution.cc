// Convolution, NHWC by HWIO, float32, and its two gradients, as targets of jax.ffi.
#include <cstdint>
#include <exception>
#include <string>

#include "passes.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace flaxcls {

namespace ffi = xla::ffi;
using Float4d = ffi::Buffer<ffi::F32, 4>;
using Numbers = ffi::Span<const int64_t>;

// The attributes of all three targets, and the shapes checked against them.
struct ConvolutionCall {
  Geometry geometry;
  Algorithm algorithm;
  std::string wrong;  // empty: all is well

  ConvolutionCall(Numbers x, Numbers kernel, Numbers y, Numbers strides, Numbers padding,
                  int64_t groups, int64_t chosen) {
    if (strides.size() != 2 || strides[0] < 1 || strides[1] < 1) {
      wrong = "strides must be two positive numbers";
    } else if (padding.size() != 4 || *std::min_element(padding.begin(), padding.end()) < 0) {
      wrong = "padding must be four numbers, none negative: top, bottom, left, right";
    } else if (groups < 1 || x[3] % groups != 0 || y[3] % groups != 0) {
      wrong = "groups must divide the channels of input and output";
    } else if (kernel[0] < 1 || kernel[1] < 1 || kernel[2] != x[3] / groups ||
               kernel[3] != y[3]) {
      wrong = "the kernel must be (height, width, input channels / groups, output channels)";
    } else if (y[0] != x[0] ||
               y[1] != Outputs(x[1] + padding[0] + padding[1], kernel[0], strides[0]) ||
               y[2] != Outputs(x[2] + padding[2] + padding[3], kernel[1], strides[1])) {
      wrong = "the output's shape does not follow from input, kernel, strides and padding";
    }
    if (!wrong.empty()) return;
    geometry = {x[0], x[1], x[2],       x[3],       kernel[0],  kernel[1],  y[1],
                y[2], y[3], strides[0], strides[1], padding[0], padding[2], groups};
    algorithm = static_cast<Algorithm>(chosen);
    switch (algorithm) {
      case Algorithm::kDirect:
      case Algorithm::kSmallMaps: break;
      case Algorithm::kWinograd2:
      case Algorithm::kWinograd4:
        if (!SuitsWinograd(geometry, algorithm)) {
          wrong = "Winograd is for strides of 1 and kernels of 3x3, 2 also for 5x5";
        }
        break;
      default: wrong = "algorithm must be 0 (direct), 1 (small maps), 2 or 4 (Winograd)";
    }
  }

  static int64_t Outputs(int64_t inputs, int64_t kernel, int64_t stride) {
    return inputs < kernel ? 0 : (inputs - kernel) / stride + 1;
  }

  // Runs one pass, and turns what is wrong into XLA's error.
  template <class Pass>
  ffi::Error Run(const char* target, const Pass& pass) const {
    if (!wrong.empty()) return ffi::Error::InvalidArgument(std::string(target) + ": " + wrong);
    try {
      pass();
    } catch (const std::exception& error) {
      return ffi::Error::Internal(std::string(target) + ": " + error.what());
    }
    return ffi::Error::Success();
  }
};

inline ffi::Error ConvForwardTarget(ffi::ThreadPool pool, Float4d x, Float4d kernel,
                                    ffi::Result<Float4d> y, Numbers strides, Numbers padding,
                                    int64_t groups, int64_t algorithm) {
  const ConvolutionCall call(x.dimensions(), kernel.dimensions(), y->dimensions(), strides,
                             padding, groups, algorithm);
  return call.Run("conv_forward", [&] {
    Tasks tasks(pool);
    ConvForward(tasks, call.algorithm, call.geometry, x.typed_data(), kernel.typed_data(),
                y->typed_data());
  });
}

inline ffi::Error ConvInputGradientTarget(ffi::ThreadPool pool, Float4d dy, Float4d kernel,
                                          ffi::Result<Float4d> dx, Numbers strides,
                                          Numbers padding, int64_t groups, int64_t algorithm) {
  const ConvolutionCall call(dx->dimensions(), kernel.dimensions(), dy.dimensions(), strides,
                             padding, groups, algorithm);
  return call.Run("conv_input_gradient", [&] {
    Tasks tasks(pool);
    ConvInputGradient(tasks, call.algorithm, call.geometry, dy.typed_data(), kernel.typed_data(),
                      dx->typed_data());
  });
}

inline ffi::Error ConvKernelGradientTarget(ffi::ThreadPool pool, Float4d x, Float4d dy,
                                           ffi::Result<Float4d> kernel, Numbers strides,
                                           Numbers padding, int64_t groups, int64_t algorithm) {
  const ConvolutionCall call(x.dimensions(), kernel->dimensions(), dy.dimensions(), strides,
                             padding, groups, algorithm);
  return call.Run("conv_kernel_gradient", [&] {
    Tasks tasks(pool);
    ConvKernelGradient(tasks, call.algorithm, call.geometry, x.typed_data(), dy.typed_data(),
                       kernel->typed_data());
  });
}

inline auto ConvolutionBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Float4d>()
      .Arg<Float4d>()
      .Ret<Float4d>()
      .Attr<Numbers>("strides")
      .Attr<Numbers>("padding")
      .Attr<int64_t>("groups")
      .Attr<int64_t>("algorithm");
}

}  // namespace flaxcls

XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_forward, flaxcls::ConvForwardTarget,
                              flaxcls::ConvolutionBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_input_gradient, flaxcls::ConvInputGradientTarget,
                              flaxcls::ConvolutionBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(conv_kernel_gradient, flaxcls::ConvKernelGradientTarget,
                              flaxcls::ConvolutionBinding());
