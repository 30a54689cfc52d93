// Convolution of maps so small that most taps of most pixels fall on padding: the rows of a tile
// are the same pixel of several images, and taps outside the map are left out.
// 3x3 on 2x2 maps: 4 taps of 9 for each pixel. See ConvolveSmallMaps in convolution.py for times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "direct.h"
#include "geometry.h"
#include "scratch.h"
#include "tasks.h"
#include "tiles.h"

namespace flaxcls {

struct Range {
  int64_t begin, end;
  int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

// The taps of `taps` that fall inside a map of size `size` for output position `at`.
inline Range TapsInside(int64_t at, int64_t step, int64_t before, int64_t taps, int64_t size) {
  const int64_t first = at * step - before;
  return {std::max<int64_t>(0, -first), std::min(taps, size - first)};
}

// The taps that fall inside for any of `outputs` positions.
inline Range TapsUsed(int64_t outputs, int64_t step, int64_t before, int64_t taps, int64_t size) {
  Range used = {taps, 0};
  for (int64_t at = 0; at < outputs; ++at) {
    const Range inside = TapsInside(at, step, before, taps, size);
    if (inside.size() == 0) continue;
    used = {std::min(used.begin, inside.begin), std::max(used.end, inside.end)};
  }
  return used;
}

inline void ConvolveSmallMaps(Tasks& tasks, const Convolution& conv) {
  const Kernel<const float>& kernel = conv.kernel;
  const Images<const float>& in = conv.in;
  const Images<float>& out = conv.out;
  if (out.empty()) return;
  const Range used_h = TapsUsed(out.h, conv.step_h, conv.top, kernel.h, in.h);
  const Range used_w = TapsUsed(out.w, conv.step_w, conv.left, kernel.w, in.w);
  const int64_t tap_count = used_h.size() * used_w.size();
  if (tap_count * kernel.inputs == 0) return FillZeros(out);

  const Blocks outputs(kernel.outputs);
  const ChannelParts parts(kernel.inputs, kSlabFloats / (tap_count * outputs.width(0)));
  const int64_t shares =  // of the images
      std::clamp<int64_t>(CeilDiv(2 * tasks.threads(), outputs.count()), 1, CeilDiv(out.n, 6));
  std::vector<int64_t> tap_offsets;
  for (int64_t x = 0; x < used_w.size(); ++x) tap_offsets.push_back(x * in.pixel);

  tasks.Run(outputs.count() * shares, [&](int64_t task) {
    const int64_t o = task / shares, share = task % shares;
    const int64_t first = out.n * share / shares, end = out.n * (share + 1) / shares;
    const int64_t width = outputs.width(o);
    const Scratch slab(tap_count * CeilDiv(kernel.inputs, parts.count) * width);
    Product product;
    product.taps = tap_offsets.data();
    product.last = outputs.last(o);
    for (int64_t part = 0; part < parts.count; ++part) {
      product.depth = parts.size(part);
      float* to = slab.data();
      for (int64_t a = used_h.begin; a < used_h.end; ++a) {
        for (int64_t b = used_w.begin; b < used_w.end; ++b, to += product.depth * width) {
          PackKernel(kernel, a, b, parts.first(part), product.depth, outputs.first(o), width, to);
        }
      }
      for (int64_t y = 0; y < out.h; ++y) {
        const Range rows = TapsInside(y, conv.step_h, conv.top, kernel.h, in.h);
        for (int64_t x = 0; x < out.w; ++x) {
          const Range columns = TapsInside(x, conv.step_w, conv.left, kernel.w, in.w);
          const bool outside = rows.size() * columns.size() == 0;
          if (outside && part > 0) continue;
          product.tap_count = outside ? 0 : columns.size();
          product.add = part > 0;
          const Range each = outside ? Range{0, 1} : rows;  // no tap inside: sums of nothing
          for (int64_t a = each.begin; a < each.end; ++a) {
            const int64_t tap = (a - used_h.begin) * used_w.size() + columns.begin - used_w.begin;
            product.weights = slab.data() + tap * product.depth * width;
            const int64_t from =
                (y * conv.step_h - conv.top + a) * in.row +
                (x * conv.step_w - conv.left + columns.begin) * in.pixel + parts.first(part);
            WithVectors(outputs.vectors(o), [&](auto vectors) {
              constexpr int kRows = TileRows(vectors);
              for (int64_t i = first; i < end; i += kRows) {
                const int64_t count = std::min<int64_t>(kRows, end - i);
                for (int64_t r = 0; r < count; ++r) {
                  product.rows[r] = in.data + (i + r) * in.image + from;
                  product.sums[r] = out.At(i + r, y, x) + outputs.first(o);
                }
                Multiply<vectors>(count, product);
              }
            });
            product.add = true;
          }
        }
      }
    }
  });
}

inline void KernelGradientSmallMaps(Tasks& tasks, const KernelGradient& gradient) {
  const Kernel<float>& kernel = gradient.kernel;
  const Images<const float>& in = gradient.in;
  const Images<const float>& dy = gradient.out;
  if (kernel.h * kernel.w * kernel.inputs * kernel.outputs == 0) return;
  if (dy.empty() || in.empty()) return FillZeros(kernel);

  const Blocks outputs(kernel.outputs);
  const ChannelParts parts(kernel.inputs, kGradientChannels);
  tasks.Run(kernel.h * kernel.w * outputs.count(), [&](int64_t task) {
    const int64_t tap = task % (kernel.h * kernel.w), o = task / (kernel.h * kernel.w);
    const int64_t a = tap / kernel.w, b = tap % kernel.w;
    std::vector<int64_t> in_offsets, dy_offsets;
    for (int64_t y = 0; y < dy.h; ++y) {
      const int64_t from_y = y * gradient.step_h + a - gradient.top;
      if (from_y < 0 || from_y >= in.h) continue;
      for (int64_t x = 0; x < dy.w; ++x) {
        const int64_t from_x = x * gradient.step_w + b - gradient.left;
        if (from_x < 0 || from_x >= in.w) continue;
        for (int64_t i = 0; i < dy.n; ++i) {
          in_offsets.push_back(i * in.image + from_y * in.row + from_x * in.pixel);
          dy_offsets.push_back(i * dy.image + y * dy.row + x * dy.pixel);
        }
      }
    }
    OuterProduct product;
    product.y = dy.data + outputs.first(o);
    product.sums_row = kernel.input;
    product.last = outputs.last(o);
    for (int64_t part = 0; part < parts.count; ++part) {
      product.x = in.data + parts.first(part);
      product.sums = kernel.At(a, b, parts.first(part), outputs.first(o));
      const int64_t all = in_offsets.size();
      for (int64_t begin = 0; begin == 0 || begin < all; begin += kGradientPixels) {
        product.x_offsets = in_offsets.data() + begin;
        product.y_offsets = dy_offsets.data() + begin;
        product.count = std::min(kGradientPixels, all - begin);
        product.add = begin > 0;
        WithVectors(outputs.vectors(o),
                    [&](auto vectors) { AddOuterProducts<vectors>(parts.size(part), product); });
      }
    }
  });
}

}  // namespace flaxcls
