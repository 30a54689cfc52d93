// The three passes of a convolution, each a convolution or a kernel gradient of views.
#pragma once

#include <algorithm>
#include <cstdint>

#include "direct.h"
#include "geometry.h"
#include "small_maps.h"
#include "tasks.h"
#include "winograd.h"

namespace flaxcls {

// kWinograd2 computes 2x2 outputs at once of a 3x3 kernel or of a 5x5 one, kWinograd4 4x4 of a 3x3.
enum class Algorithm : int64_t { kDirect = 0, kSmallMaps = 1, kWinograd2 = 2, kWinograd4 = 4 };

// x (n, h, w, c) by a kernel (kernel_h, kernel_w, c / groups, o) to y (n, out_h, out_w, o).
struct Geometry {
  int64_t n, h, w, c;
  int64_t kernel_h, kernel_w;
  int64_t out_h, out_w, o;
  int64_t stride_h, stride_w;
  int64_t top, left;  // rows and columns of zeros before the image
  int64_t groups;
};

inline bool SuitsWinograd(const Geometry& g, Algorithm algorithm) {
  const bool five = algorithm == Algorithm::kWinograd2 && g.kernel_h == 5;
  return g.kernel_h == g.kernel_w && (g.kernel_h == 3 || five) && g.stride_h == 1 &&
         g.stride_w == 1;
}

// The channels of one group.
template <class Float>
Images<Float> InputOfGroup(const Geometry& g, int64_t group, Float* x) {
  const int64_t channels = g.c / g.groups;
  return {x + group * channels, g.n, g.h, g.w, channels, g.h * g.w * g.c, g.w * g.c, g.c};
}

template <class Float>
Images<Float> OutputOfGroup(const Geometry& g, int64_t group, Float* y) {
  const int64_t channels = g.o / g.groups;
  return {y + group * channels, g.n, g.out_h, g.out_w, channels,
          g.out_h * g.out_w * g.o, g.out_w * g.o, g.o};
}

template <class Float>
Kernel<Float> KernelOfGroup(const Geometry& g, int64_t group, Float* kernel) {
  const int64_t inputs = g.c / g.groups, outputs = g.o / g.groups;
  return {kernel + group * outputs, g.kernel_h, g.kernel_w, inputs, outputs,
          g.kernel_w * inputs * g.o, inputs * g.o, g.o, 1};
}

inline void Convolve(Tasks& tasks, Algorithm algorithm, const Convolution& conv) {
  switch (algorithm) {
    case Algorithm::kDirect: return ConvolveDirect(tasks, conv);
    case Algorithm::kSmallMaps: return ConvolveSmallMaps(tasks, conv);
    case Algorithm::kWinograd2:
      return conv.kernel.h == 5 ? ConvolveWinograd<F2x5>(tasks, conv)
                                : ConvolveWinograd<F2x3>(tasks, conv);
    case Algorithm::kWinograd4: return ConvolveWinograd<F4x3>(tasks, conv);
  }
}

inline void ConvForward(Tasks& tasks, Algorithm algorithm, const Geometry& g, const float* x,
                        const float* kernel, float* y) {
  for (int64_t group = 0; group < g.groups; ++group) {
    Convolve(tasks, algorithm,
             {InputOfGroup(g, group, x), KernelOfGroup(g, group, kernel),
              OutputOfGroup(g, group, y), g.stride_h, g.stride_w, g.top, g.left});
  }
}

// Along one axis, the inputs first, first + stride, ... see the taps tap, tap + stride, ... of the
// kernel alone: their gradient is a convolution of step 1 of dy with those taps, backwards.
struct Residue {
  Residue(int64_t first, int64_t stride, int64_t before, int64_t kernel, int64_t inputs)
      : first(first),
        inputs(std::max<int64_t>(0, CeilDiv(inputs - first, stride))),
        tap((first + before) % stride),
        taps(std::max<int64_t>(0, CeilDiv(kernel - tap, stride))),
        before(taps - 1 - (first + before - tap) / stride) {}

  int64_t first, inputs;
  int64_t tap, taps;
  int64_t before;  // zeros before dy
};

inline void ConvInputGradient(Tasks& tasks, Algorithm algorithm, const Geometry& g,
                              const float* dy, const float* kernel, float* dx) {
  for (int64_t group = 0; group < g.groups; ++group) {
    const Images<const float> from = OutputOfGroup(g, group, dy);
    const Kernel<const float> all = KernelOfGroup(g, group, kernel);
    const Images<float> to = InputOfGroup(g, group, dx);
    for (int64_t y = 0; y < g.stride_h; ++y) {
      const Residue rows(y, g.stride_h, g.top, g.kernel_h, g.h);
      for (int64_t x = 0; x < g.stride_w; ++x) {
        const Residue columns(x, g.stride_w, g.left, g.kernel_w, g.w);
        if (rows.inputs == 0 || columns.inputs == 0) continue;
        Kernel<const float> seen = all;
        seen.data = all.At(std::min(rows.tap, g.kernel_h - 1),
                           std::min(columns.tap, g.kernel_w - 1), 0, 0);
        seen.h = rows.taps;
        seen.w = columns.taps;
        seen.row *= g.stride_h;
        seen.column *= g.stride_w;
        Images<float> sub_grid = to;
        sub_grid.data = to.At(0, y, x);
        sub_grid.h = rows.inputs;
        sub_grid.w = columns.inputs;
        sub_grid.row *= g.stride_h;
        sub_grid.pixel *= g.stride_w;
        if (seen.h * seen.w == 0 || from.empty()) {
          FillZeros(sub_grid);
        } else {
          Convolve(tasks, algorithm,
                   {from, seen.Flipped().Transposed(), sub_grid, 1, 1, rows.before,
                    columns.before});
        }
      }
    }
  }
}

inline void ConvKernelGradient(Tasks& tasks, Algorithm algorithm, const Geometry& g,
                               const float* x, const float* dy, float* kernel) {
  for (int64_t group = 0; group < g.groups; ++group) {
    const KernelGradient gradient = {InputOfGroup(g, group, x),
                                     OutputOfGroup(g, group, dy),
                                     KernelOfGroup(g, group, kernel),
                                     g.stride_h,
                                     g.stride_w,
                                     g.top,
                                     g.left};
    switch (algorithm) {
      case Algorithm::kDirect: KernelGradientDirect(tasks, gradient); break;
      case Algorithm::kSmallMaps: KernelGradientSmallMaps(tasks, gradient); break;
      case Algorithm::kWinograd2:
        gradient.kernel.h == 5 ? KernelGradientWinograd<F2x5>(tasks, gradient)
                               : KernelGradientWinograd<F2x3>(tasks, gradient);
        break;
      case Algorithm::kWinograd4: KernelGradientWinograd<F4x3>(tasks, gradient); break;
    }
  }
}

}  // namespace flaxcls
