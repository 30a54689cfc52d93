// Direct convolution: for each tile of output pixels and channels, the sum over the kernel's taps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "geometry.h"
#include "scratch.h"
#include "tasks.h"
#include "tiles.h"

namespace flaxcls {

constexpr int64_t kBlockFloats = 64 << 10;  // input pixels of a block: a quarter of the L2 cache
constexpr int64_t kSlabFloats = 48 << 10;   // weights that a block's tiles share, beside it in L2
constexpr int64_t kBlockPixels = 1024;

// The output pixels of a convolution in blocks: some whole images, or some rows of one image.
class PixelBlocks {
 public:
  struct Block {
    int64_t image, images, row, rows;

    int64_t pixels(int64_t columns) const { return images * rows * columns; }
  };

  // C is a Convolution or a KernelGradient, of which `channels` of the input are read at a time.
  template <class C>
  PixelBlocks(const C& conv, int64_t channels, int64_t most_pixels, int64_t least_blocks)
      : images_(conv.out.n), rows_(conv.out.h), columns_(conv.out.w) {
    // `rows` rows of outputs read rows * row_floats + overlap_floats.
    const int64_t line_floats = ((columns_ - 1) * conv.step_w + conv.kernel.w) * channels;
    const int64_t row_floats = conv.step_h * line_floats;
    const int64_t overlap_floats =
        std::max<int64_t>(0, conv.kernel.h - conv.step_h) * line_floats;
    const int64_t rows_fit = std::clamp<int64_t>(
        std::min((kBlockFloats - overlap_floats) / row_floats, most_pixels / columns_), 1, rows_);
    strips_ = CeilDiv(rows_, rows_fit);
    if (images_ * strips_ < least_blocks) strips_ = std::min(rows_, CeilDiv(least_blocks, images_));
    count_ = images_ * strips_;
    if (strips_ == 1) {
      const int64_t images_fit = std::min(kBlockFloats / (rows_ * row_floats + overlap_floats),
                                          most_pixels / (rows_ * columns_));
      count_ = CeilDiv(images_, std::max<int64_t>(1, images_fit));
      count_ = std::max(count_, std::min(images_, least_blocks));
    }
  }

  int64_t count() const { return count_; }
  int64_t most_images() const { return strips_ > 1 ? 1 : CeilDiv(images_, count_); }
  int64_t most_rows() const { return CeilDiv(rows_, strips_); }

  Block At(int64_t i) const {
    if (strips_ == 1) {
      const int64_t begin = images_ * i / count_;
      return {begin, images_ * (i + 1) / count_ - begin, 0, rows_};
    }
    const int64_t strip = i % strips_, begin = rows_ * strip / strips_;
    return {i / strips_, 1, begin, rows_ * (strip + 1) / strips_ - begin};
  }

  // Of the pixels of the largest block, one after the other; other blocks use the first of them.
  std::vector<int64_t> Offsets(int64_t image, int64_t row, int64_t pixel) const {
    std::vector<int64_t> offsets;
    offsets.reserve(most_images() * most_rows() * columns_);
    for (int64_t i = 0; i < most_images(); ++i) {
      for (int64_t y = 0; y < most_rows(); ++y) {
        for (int64_t x = 0; x < columns_; ++x) {
          offsets.push_back(i * image + y * row + x * pixel);
        }
      }
    }
    return offsets;
  }

 private:
  int64_t images_, rows_, columns_, strips_, count_;
};

// What the pixels of a block read: the images themselves, or a copy with the padding around it.
class BlockInput {
 public:
  // Of channels [first, first + channels); C is a Convolution or a KernelGradient.
  template <class C>
  BlockInput(const C& conv, const PixelBlocks& blocks, int64_t channels)
      : in_(conv.in),
        step_h_(conv.step_h),
        top_(conv.top),
        left_(conv.left),
        taps_h_(conv.kernel.h),
        columns_((conv.out.w - 1) * conv.step_w + conv.kernel.w),
        channels_(channels) {
    const int64_t rows = (conv.out.h - 1) * step_h_ + taps_h_;
    in_place_ = top_ <= 0 && left_ <= 0 && rows - top_ <= in_.h && columns_ - left_ <= in_.w;
    pixel = in_place_ ? in_.pixel : channels;
    row = in_place_ ? in_.row : columns_ * pixel;
    image = in_place_ ? in_.image : ((blocks.most_rows() - 1) * step_h_ + taps_h_) * row;
    copy_floats = in_place_ ? 0 : blocks.most_images() * image;
    offsets = blocks.Offsets(image, step_h_ * row, conv.step_w * pixel);
  }

  // Where the block's first output pixel finds channel `first` under the kernel's first tap.
  const float* Prepare(const PixelBlocks::Block& block, int64_t first, float* copy) const {
    const int64_t top = block.row * step_h_ - top_;
    if (in_place_) return in_.At(block.image, top, -left_) + first;
    const int64_t rows = (block.rows - 1) * step_h_ + taps_h_;
    for (int64_t i = 0; i < block.images; ++i) {
      for (int64_t y = 0; y < rows; ++y) {
        CopyRow(block.image + i, top + y, first, copy + i * image + y * row);
      }
    }
    return copy;
  }

  int64_t image, row, pixel;     // strides of what is read
  int64_t copy_floats;           // of scratch for the copy
  std::vector<int64_t> offsets;  // of a block's output pixels, one after the other

 private:
  void CopyRow(int64_t i, int64_t y, int64_t first, float* copy) const {
    const int64_t begin = std::clamp<int64_t>(left_, 0, columns_);  // columns inside the image
    const int64_t end = std::clamp<int64_t>(in_.w + left_, begin, columns_);
    if (y < 0 || y >= in_.h || begin == end) {
      std::fill_n(copy, columns_ * channels_, 0.0f);
      return;
    }
    const float* from = in_.At(i, y, begin - left_) + first;
    std::fill_n(copy, begin * channels_, 0.0f);
    if (in_.pixel == channels_) {
      std::copy_n(from, (end - begin) * channels_, copy + begin * channels_);
    } else {
      for (int64_t x = begin; x < end; ++x, from += in_.pixel) {
        std::copy_n(from, channels_, copy + x * channels_);
      }
    }
    std::fill_n(copy + end * channels_, (columns_ - end) * channels_, 0.0f);
  }

  Images<const float> in_;
  int64_t step_h_, top_, left_, taps_h_, columns_, channels_;
  bool in_place_;
};

// Offsets of the kernel's taps in what a block reads; where the channels of a row's taps follow one
// another, the row is one tap of that many channels: with one input channel 9 taps become 3.
template <class Float>
struct Taps {
  Taps(const Kernel<Float>& kernel, const BlockInput& input, int64_t channels) {
    const bool joined = channels == kernel.inputs && input.pixel == channels;
    depth = joined ? kernel.w * channels : channels;
    for (int64_t y = 0; y < kernel.h; ++y) {
      for (int64_t x = 0; x < (joined ? 1 : kernel.w); ++x) {
        offsets.push_back(y * input.row + x * input.pixel);
      }
    }
  }

  std::vector<int64_t> offsets;
  int64_t depth;  // inputs of a tap
};

// Channels in even parts of at most `most`.
struct ChannelParts {
  ChannelParts(int64_t channels, int64_t most)
      : channels(channels), count(CeilDiv(channels, std::max<int64_t>(1, most))) {}

  int64_t first(int64_t i) const { return channels * i / count; }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }
  int64_t most() const { return CeilDiv(channels, count); }

  int64_t channels, count;
};

// The weights in the order in which tiles read them: slabs (tap, channel, output), one for each
// block of outputs and part of the input channels.
class Slabs {
 public:
  Slabs(Tasks& tasks, const Kernel<const float>& kernel, const Blocks& outputs)
      : parts(kernel.inputs, kSlabFloats / (kernel.h * kernel.w * outputs.width(0))),
        kernel_(kernel),
        outputs_(outputs),
        packed_(kernel.h * kernel.w * kernel.inputs * outputs.all_width()) {
    tasks.Run(outputs.count() * parts.count, [&](int64_t i) {
      const int64_t o = i / parts.count, part = i % parts.count;
      float* to = At(o, part);
      for (int64_t y = 0; y < kernel.h; ++y) {
        for (int64_t x = 0; x < kernel.w; ++x, to += parts.size(part) * outputs.width(o)) {
          PackKernel(kernel, y, x, parts.first(part), parts.size(part), outputs.first(o),
                     outputs.width(o), to);
        }
      }
    });
  }

  float* At(int64_t o, int64_t part) const {
    const int64_t before =
        outputs_.first(o) * kernel_.inputs + outputs_.width(o) * parts.first(part);
    return packed_.data() + kernel_.h * kernel_.w * before;
  }

  ChannelParts parts;

 private:
  const Kernel<const float>& kernel_;
  const Blocks& outputs_;
  Scratch packed_;
};

inline void ConvolveDirect(Tasks& tasks, const Convolution& conv) {
  const Kernel<const float>& kernel = conv.kernel;
  if (conv.out.empty()) return;
  if (kernel.h * kernel.w * kernel.inputs == 0) return FillZeros(conv.out);

  const Blocks outputs(kernel.outputs);
  const Slabs slabs(tasks, kernel, outputs);
  const PixelBlocks blocks(conv, kernel.inputs, kBlockPixels, 2 * tasks.threads());
  const BlockInput input(conv, blocks, kernel.inputs);
  const auto out_offsets = blocks.Offsets(conv.out.image, conv.out.row, conv.out.pixel);
  // Where the blocks are too few for the threads, these share the outputs of each block as well.
  const int64_t shares =
      std::clamp<int64_t>(CeilDiv(2 * tasks.threads(), blocks.count()), 1, outputs.count());

  tasks.Run(blocks.count() * shares, [&](int64_t task) {
    const PixelBlocks::Block block = blocks.At(task / shares);
    const int64_t share = task % shares;
    const Scratch copy(input.copy_floats);
    const float* in = input.Prepare(block, 0, copy.data());
    float* out = conv.out.At(block.image, block.row, 0);
    for (int64_t o = outputs.count() * share / shares;
         o < outputs.count() * (share + 1) / shares; ++o) {
      for (int64_t part = 0; part < slabs.parts.count; ++part) {
        const Taps taps(kernel, input, slabs.parts.size(part));
        Product product;
        product.taps = taps.offsets.data();
        product.tap_count = taps.offsets.size();
        product.depth = taps.depth;
        product.weights = slabs.At(o, part);
        product.last = outputs.last(o);
        product.add = part > 0;
        Multiply(
            block.pixels(conv.out.w), outputs.vectors(o), product,
            [&](int64_t i) { return in + input.offsets[i] + slabs.parts.first(part); },
            [&](int64_t i) { return out + out_offsets[i] + outputs.first(o); });
      }
    }
  });
}

constexpr int64_t kGradientPixels = 512;       // that a tile of sums adds before it is stored
constexpr int64_t kGradientChannels = 64;      // of the input in a block
constexpr int64_t kMostApartFloats = 4 << 20;  // sums that threads keep apart, all together

// Several sums of one kernel, to be filled by several threads: the first is the kernel itself.
class SumsApart {
 public:
  SumsApart(const Kernel<float>& kernel, int64_t count)
      : kernel_(kernel),
        count_(count),
        floats_(kernel.h * kernel.w * kernel.inputs * kernel.outputs),
        others_((count - 1) * floats_) {}

  Kernel<float> At(int64_t i) const {
    if (i == 0) return kernel_;
    const int64_t column = kernel_.inputs * kernel_.outputs;
    return {others_.data() + (i - 1) * floats_, kernel_.h, kernel_.w, kernel_.inputs,
            kernel_.outputs, kernel_.w * column, column, kernel_.outputs, 1};
  }

  void AddToFirst(Tasks& tasks) const {
    if (count_ == 1) return;
    tasks.RunParts(kernel_.h * kernel_.w * kernel_.inputs, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t in = i % kernel_.inputs, tap = i / kernel_.inputs;
        float* to = kernel_.At(tap / kernel_.w, tap % kernel_.w, in, 0);
        for (int64_t other = 0; other < count_ - 1; ++other) {
          const float* from = others_.data() + other * floats_ + i * kernel_.outputs;
          for (int64_t o = 0; o < kernel_.outputs; ++o) to[o] += from[o];
        }
      }
    });
  }

 private:
  Kernel<float> kernel_;
  int64_t count_, floats_;
  Scratch others_;
};

inline void KernelGradientDirect(Tasks& tasks, const KernelGradient& gradient) {
  const Kernel<float>& kernel = gradient.kernel;
  const Images<const float>& dy = gradient.out;
  const int64_t floats = kernel.h * kernel.w * kernel.inputs * kernel.outputs;
  if (floats == 0) return;
  if (dy.empty()) return FillZeros(kernel);

  // Threads share the pixels, each with sums of its own, or the channels where these sums are large
  // or the channels share out evenly.
  const bool large = floats * tasks.threads() > kMostApartFloats;
  const ChannelParts parts(
      kernel.inputs, large ? std::clamp<int64_t>(CeilDiv(kernel.inputs, tasks.threads()),
                                                 kTileRows, kGradientChannels)
                           : kGradientChannels);
  const PixelBlocks blocks(gradient, parts.most(), kGradientPixels, tasks.threads());
  const bool share_pixels = !large && parts.count % tasks.threads() != 0;
  const int64_t shares = share_pixels ? std::min(tasks.threads(), blocks.count()) : 1;
  const SumsApart sums(kernel, shares);
  const Blocks outputs(kernel.outputs);
  const auto dy_offsets = blocks.Offsets(dy.image, dy.row, dy.pixel);

  tasks.Run(parts.count * shares, [&](int64_t task) {
    const int64_t part = task / shares, share = task % shares;
    const Kernel<float> sum = sums.At(share);
    const BlockInput input(gradient, blocks, parts.size(part));
    const Taps taps(kernel, input, parts.size(part));
    const int64_t taps_of_row = taps.offsets.size() / kernel.h;
    const Scratch copy(input.copy_floats);
    OuterProduct product;
    product.x_offsets = input.offsets.data();
    product.y_offsets = dy_offsets.data();
    product.sums_row = sum.input;
    product.add = false;
    for (int64_t b = blocks.count() * share / shares; b < blocks.count() * (share + 1) / shares;
         ++b) {
      const PixelBlocks::Block block = blocks.At(b);
      const float* in = input.Prepare(block, parts.first(part), copy.data());
      product.count = block.pixels(dy.w);
      for (int64_t o = 0; o < outputs.count(); ++o) {
        product.y = dy.At(block.image, block.row, 0) + outputs.first(o);
        product.last = outputs.last(o);
        for (int64_t t = 0; t < int64_t(taps.offsets.size()); ++t) {
          product.x = in + taps.offsets[t];
          product.sums =
              sum.At(t / taps_of_row, t % taps_of_row, parts.first(part), outputs.first(o));
          AddOuterProducts(taps.depth, outputs.vectors(o), product);
        }
      }
      product.add = true;
    }
  });
  sums.AddToFirst(tasks);
}

}  // namespace flaxcls
