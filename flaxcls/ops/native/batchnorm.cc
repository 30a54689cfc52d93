// Batch normalisation with what is fused with it, and its gradients, as targets of jax.ffi.
#include <cstdint>
#include <vector>

#include "batchnorm_backward.h"
#include "batchnorm_forward.h"
#include "buffers.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace flaxcls {

// The shape of x (..., C); height and width are 1 where a pool does not ask for them.
inline xla::ffi::Error ReadShape(xla::ffi::AnyBuffer x, bool pool, MapShape* shape) {
  const auto dimensions = x.dimensions();
  if (dimensions.size() < 2 || (pool && dimensions.size() != 4)) {
    return xla::ffi::Error::InvalidArgument("batch_norm: x must be (..., C), (N, H, W, C) to pool");
  }
  *shape = {1, 1, 1, dimensions.back()};
  if (pool) {
    *shape = {dimensions[0], dimensions[1], dimensions[2], dimensions[3]};
  } else {
    for (size_t i = 0; i + 1 < dimensions.size(); ++i) shape->examples *= dimensions[i];
  }
  return xla::ffi::Error::Success();
}

inline xla::ffi::Error BatchNormForwardHandler(
    xla::ffi::ThreadPool pool_of_threads, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer residual,
    xla::ffi::AnyBuffer scale, xla::ffi::AnyBuffer bias, xla::ffi::Result<xla::ffi::AnyBuffer> y,
    xla::ffi::Result<xla::ffi::AnyBuffer> mean, xla::ffi::Result<xla::ffi::AnyBuffer> mean_rest,
    xla::ffi::Result<xla::ffi::AnyBuffer> variance, xla::ffi::Result<xla::ffi::AnyBuffer> winner,
    bool add, bool relu, bool pool, float epsilon) {
  MapShape shape;
  if (auto error = ReadShape(x, pool, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t elements = x.element_count(), results = pool ? PooledElements(shape) : elements;
  if (!HaveSize(xla::ffi::F32, shape.channels, scale, bias, *mean, *mean_rest, *variance) ||
      !HaveSize(type, results, *y) || (add && !HaveSize(type, elements, residual)) ||
      (pool && !HaveSize(xla::ffi::U8, results, *winner))) {
    return xla::ffi::Error::InvalidArgument("batch_norm_forward: a type or shape does not fit");
  }
  return WithType(type, "batch_norm_forward", [&](auto zero) {
    using T = decltype(zero);
    const BatchNormForwardArrays<T> arrays = {
        static_cast<const T*>(x.untyped_data()),    static_cast<const T*>(residual.untyped_data()),
        scale.typed_data<float>(),                  bias.typed_data<float>(),
        static_cast<T*>(y->untyped_data()),         mean->typed_data<float>(),
        mean_rest->typed_data<float>(),             variance->typed_data<float>(),
        static_cast<uint8_t*>(winner->untyped_data()),
    };
    Tasks tasks(pool_of_threads);
    WithFusion(add, relu, pool, [&](auto fusion) {
      BatchNormForward<decltype(fusion)>(shape, epsilon, arrays, tasks);
    });
  });
}

// With statistics that are given, as when training is over.
inline xla::ffi::Error BatchNormInferenceHandler(
    xla::ffi::ThreadPool pool_of_threads, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer residual,
    xla::ffi::AnyBuffer scale, xla::ffi::AnyBuffer bias, xla::ffi::AnyBuffer mean,
    xla::ffi::AnyBuffer variance, xla::ffi::Result<xla::ffi::AnyBuffer> y, bool add, bool relu,
    bool pool, float epsilon) {
  MapShape shape;
  if (auto error = ReadShape(x, pool, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t elements = x.element_count(), results = pool ? PooledElements(shape) : elements;
  if (!HaveSize(xla::ffi::F32, shape.channels, scale, bias, mean, variance) ||
      !HaveSize(type, results, *y) || (add && !HaveSize(type, elements, residual))) {
    return xla::ffi::Error::InvalidArgument("batch_norm_inference: a type or shape does not fit");
  }
  return WithType(type, "batch_norm_inference", [&](auto zero) {
    using T = decltype(zero);
    std::vector<float> mean_rest(shape.channels);
    const BatchNormForwardArrays<T> arrays = {
        static_cast<const T*>(x.untyped_data()),
        static_cast<const T*>(residual.untyped_data()),
        scale.typed_data<float>(),
        bias.typed_data<float>(),
        static_cast<T*>(y->untyped_data()),
        mean.typed_data<float>(),
        mean_rest.data(),
        variance.typed_data<float>(),
        nullptr,
    };
    Tasks tasks(pool_of_threads);
    WithFusion(add, relu, pool, [&](auto fusion) {
      Normalize<decltype(fusion)>(shape, epsilon, arrays, tasks);
    });
  });
}

inline xla::ffi::Error BatchNormBackwardHandler(
    xla::ffi::ThreadPool pool_of_threads, xla::ffi::AnyBuffer x, xla::ffi::AnyBuffer y,
    xla::ffi::AnyBuffer gradient, xla::ffi::AnyBuffer winner, xla::ffi::AnyBuffer scale,
    xla::ffi::AnyBuffer bias, xla::ffi::AnyBuffer mean, xla::ffi::AnyBuffer mean_rest,
    xla::ffi::AnyBuffer variance, xla::ffi::Result<xla::ffi::AnyBuffer> dx,
    xla::ffi::Result<xla::ffi::AnyBuffer> dresidual, xla::ffi::Result<xla::ffi::AnyBuffer> dscale,
    xla::ffi::Result<xla::ffi::AnyBuffer> dbias, bool add, bool relu, bool pool, float epsilon) {
  MapShape shape;
  if (auto error = ReadShape(x, pool, &shape); error.failure()) return error;
  const auto type = x.element_type();
  const int64_t elements = x.element_count(), results = pool ? PooledElements(shape) : elements;
  if (!HaveSize(xla::ffi::F32, shape.channels, scale, bias, mean, mean_rest, variance, *dscale,
                *dbias) ||
      !HaveSize(type, elements, *dx) || !HaveSize(type, results, gradient) ||
      (add && relu && !pool && !HaveSize(type, elements, y)) ||
      (add && (relu || pool) && !HaveSize(type, elements, *dresidual)) ||
      (pool && !HaveSize(xla::ffi::U8, results, winner))) {
    return xla::ffi::Error::InvalidArgument("batch_norm_backward: a type or shape does not fit");
  }
  return WithType(type, "batch_norm_backward", [&](auto zero) {
    using T = decltype(zero);
    const BatchNormBackwardArrays<T> arrays = {
        static_cast<const T*>(x.untyped_data()),
        static_cast<const T*>(y.untyped_data()),
        static_cast<const T*>(gradient.untyped_data()),
        static_cast<const uint8_t*>(winner.untyped_data()),
        scale.typed_data<float>(),
        bias.typed_data<float>(),
        mean.typed_data<float>(),
        mean_rest.typed_data<float>(),
        variance.typed_data<float>(),
        static_cast<T*>(dx->untyped_data()),
        static_cast<T*>(dresidual->untyped_data()),
        dscale->typed_data<float>(),
        dbias->typed_data<float>(),
    };
    Tasks tasks(pool_of_threads);
    WithFusion(add, relu, pool, [&](auto fusion) {
      BatchNormBackward<decltype(fusion)>(shape, epsilon, arrays, tasks);
    });
  });
}

}  // namespace flaxcls

XLA_FFI_DEFINE_HANDLER_SYMBOL(batch_norm_forward, flaxcls::BatchNormForwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // residual
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Ret<xla::ffi::AnyBuffer>()  // mean
                                  .Ret<xla::ffi::AnyBuffer>()  // mean_rest
                                  .Ret<xla::ffi::AnyBuffer>()  // variance
                                  .Ret<xla::ffi::AnyBuffer>()  // winner
                                  .Attr<bool>("residual")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(batch_norm_inference, flaxcls::BatchNormInferenceHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // residual
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Ret<xla::ffi::AnyBuffer>()  // y
                                  .Attr<bool>("residual")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(batch_norm_backward, flaxcls::BatchNormBackwardHandler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()  // y
                                  .Arg<xla::ffi::AnyBuffer>()  // gradient
                                  .Arg<xla::ffi::AnyBuffer>()  // winner
                                  .Arg<xla::ffi::AnyBuffer>()  // scale
                                  .Arg<xla::ffi::AnyBuffer>()  // bias
                                  .Arg<xla::ffi::AnyBuffer>()  // mean
                                  .Arg<xla::ffi::AnyBuffer>()  // mean_rest
                                  .Arg<xla::ffi::AnyBuffer>()  // variance
                                  .Ret<xla::ffi::AnyBuffer>()  // dx
                                  .Ret<xla::ffi::AnyBuffer>()  // dresidual
                                  .Ret<xla::ffi::AnyBuffer>()  // dscale
                                  .Ret<xla::ffi::AnyBuffer>()  // dbias
                                  .Attr<bool>("residual")
                                  .Attr<bool>("relu")
                                  .Attr<bool>("pool")
                                  .Attr<float>("epsilon"));
