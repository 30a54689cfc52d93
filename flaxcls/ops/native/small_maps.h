// Convolution of maps so small that most taps of most pixels fall on padding: the rows of a tile
// are the same pixel of several images, and taps outside the map are left out.
// 3x3 on 2x2 maps: 4 taps of 9 for each pixel. Times are in convolution.py.
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

// One block of outputs of a small-map convolution; the inputs are taken in parts of the channels.
class SmallMapBlock {
 public:
  SmallMapBlock(const Convolution& conv, const Blocks& outputs, int64_t o)
      : used_h(TapsUsed(conv.out.h, conv.step_h, conv.top, conv.kernel.h, conv.in.h)),
        used_w(TapsUsed(conv.out.w, conv.step_w, conv.left, conv.kernel.w, conv.in.w)),
        parts(conv.kernel.inputs, kSlabFloats / std::max<int64_t>(1, taps() * outputs.width(0))),
        conv_(conv),
        outputs_(outputs),
        o_(o),
        slab_(taps() * parts.most() * outputs.width(o)) {
    for (int64_t x = 0; x < used_w.size(); ++x) tap_offsets_.push_back(x * conv.in.pixel);
  }

  // Packs the weights of one part of the channels, of the taps that any pixel uses.
  void Pack(int64_t part) const {
    float* to = slab_.data();
    for (int64_t a = used_h.begin; a < used_h.end; ++a) {
      for (int64_t b = used_w.begin; b < used_w.end; ++b, to += TapFloats(part)) {
        PackKernel(conv_.kernel, a, b, parts.first(part), parts.size(part), outputs_.first(o_),
                   outputs_.width(o_), to);
      }
    }
  }

  // Adds that part to output pixel (y, x) of some images.
  void Add(int64_t part, int64_t y, int64_t x, const Range& images) const {
    const Images<const float>& in = conv_.in;
    const Images<float>& out = conv_.out;
    const Range rows = TapsInside(y, conv_.step_h, conv_.top, conv_.kernel.h, in.h);
    const Range columns = TapsInside(x, conv_.step_w, conv_.left, conv_.kernel.w, in.w);
    const auto to = [&](int64_t i) { return out.At(images.begin + i, y, x) + outputs_.first(o_); };
    if (rows.size() * columns.size() == 0) {
      for (int64_t i = 0; i < images.size(); ++i) std::fill_n(to(i), outputs_.channels(o_), 0.0f);
      return;
    }
    Product product;
    product.taps = tap_offsets_.data();
    product.tap_count = columns.size();
    product.depth = parts.size(part);
    product.last = outputs_.last(o_);
    product.add = part > 0;
    for (int64_t a = rows.begin; a < rows.end; ++a) {
      const int64_t tap = (a - used_h.begin) * used_w.size() + columns.begin - used_w.begin;
      product.weights = slab_.data() + tap * TapFloats(part);
      const float* from = in.At(images.begin, y * conv_.step_h - conv_.top + a,
                                x * conv_.step_w - conv_.left + columns.begin);
      Multiply(
          images.size(), outputs_.vectors(o_), product,
          [&](int64_t i) { return from + i * in.image + parts.first(part); }, to);
      product.add = true;
    }
  }

  int64_t taps() const { return used_h.size() * used_w.size(); }

  const Range used_h, used_w;
  const ChannelParts parts;

 private:
  int64_t TapFloats(int64_t part) const { return parts.size(part) * outputs_.width(o_); }

  const Convolution& conv_;
  const Blocks& outputs_;
  const int64_t o_;
  const Scratch slab_;
  std::vector<int64_t> tap_offsets_;
};

inline void ConvolveSmallMaps(Tasks& tasks, const Convolution& conv) {
  const Images<float>& out = conv.out;
  if (out.empty()) return;
  if (conv.kernel.h * conv.kernel.w * conv.kernel.inputs == 0) return FillZeros(out);

  const Blocks outputs(conv.kernel.outputs);
  const int64_t shares = std::clamp<int64_t>(CeilDiv(2 * tasks.threads(), outputs.count()), 1,
                                             CeilDiv(out.n, kTileRows));  // of the images
  tasks.Run(outputs.count() * shares, [&](int64_t task) {
    const int64_t share = task % shares;
    const Range images = {out.n * share / shares, out.n * (share + 1) / shares};
    const SmallMapBlock block(conv, outputs, task / shares);
    for (int64_t part = 0; part < block.parts.count; ++part) {
      block.Pack(part);
      for (int64_t y = 0; y < out.h; ++y) {
        for (int64_t x = 0; x < out.w; ++x) block.Add(part, y, x, images);
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
        AddOuterProducts(parts.size(part), outputs.vectors(o), product);
      }
    }
  });
}

}  // namespace flaxcls
