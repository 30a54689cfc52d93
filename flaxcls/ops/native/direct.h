// Direct convolution: for each tile of output pixels and channels, the sum over the kernel's taps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
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

// The input channels in even parts, so that a part's weights for a block of outputs fit the slab.
struct ChannelParts {
  explicit ChannelParts(int64_t channels, int64_t most)
      : channels(channels), count(CeilDiv(channels, std::max<int64_t>(1, most))) {}
  int64_t first(int64_t i) const { return channels * i / count; }
  int64_t size(int64_t i) const { return first(i + 1) - first(i); }

  int64_t channels, count;
};

inline void ConvolveDirect(Tasks& tasks, const Convolution& conv) {
  const Kernel<const float>& kernel = conv.kernel;
  if (conv.out.empty()) return;
  const int64_t tap_count = kernel.h * kernel.w;
  if (tap_count * kernel.inputs == 0) return FillZeros(conv.out);

  const Blocks outputs(kernel.outputs);
  const ChannelParts parts(kernel.inputs, kSlabFloats / (tap_count * outputs.width(0)));
  const PixelBlocks blocks(conv, kernel.inputs, kBlockPixels, 2 * tasks.threads());
  const BlockInput input(conv, blocks, kernel.inputs);
  const auto out_offsets = blocks.Offsets(conv.out.image, conv.out.row, conv.out.pixel);

  // packed[block of outputs][part of the channels][tap][channel][output]
  Scratch packed(tap_count * kernel.inputs * outputs.all_width());
  const auto slab = [&](int64_t o, int64_t part) {
    const int64_t before = outputs.first(o) * kernel.inputs + outputs.width(o) * parts.first(part);
    return packed.data() + tap_count * before;
  };
  tasks.Run(outputs.count() * parts.count, [&](int64_t i) {
    const int64_t o = i / parts.count, part = i % parts.count;
    float* to = slab(o, part);
    for (int64_t t = 0; t < tap_count; ++t) {
      PackKernel(kernel, t / kernel.w, t % kernel.w, parts.first(part), parts.size(part),
                 outputs.first(o), outputs.width(o), to);
      to += parts.size(part) * outputs.width(o);
    }
  });

  // Where the blocks are too few for the threads, these share the outputs of each block as well.
  const int64_t shares = std::clamp<int64_t>(CeilDiv(2 * tasks.threads(), blocks.count()), 1,
                                             outputs.count());
  tasks.Run(blocks.count() * shares, [&](int64_t task) {
    const PixelBlocks::Block block = blocks.At(task / shares);
    const int64_t share = task % shares;
    const Scratch copy(input.copy_floats);
    const float* in = input.Prepare(block, 0, copy.data());
    float* out = conv.out.At(block.image, block.row, 0);
    const int64_t pixels = block.pixels(conv.out.w);
    for (int64_t o = outputs.count() * share / shares;
         o < outputs.count() * (share + 1) / shares; ++o) {
      for (int64_t part = 0; part < parts.count; ++part) {
        const Taps taps(kernel, input, parts.size(part));
        Product product;
        product.taps = taps.offsets.data();
        product.tap_count = taps.offsets.size();
        product.depth = taps.depth;
        product.weights = slab(o, part);
        product.last = outputs.last(o);
        product.add = part > 0;
        WithVectors(outputs.vectors(o), [&](auto vectors) {
          constexpr int kRows = TileRows(vectors);
          for (int64_t p = 0; p < pixels; p += kRows) {
            const int64_t rows = std::min<int64_t>(kRows, pixels - p);
            for (int64_t r = 0; r < rows; ++r) {
              product.rows[r] = in + input.offsets[p + r] + parts.first(part);
              product.sums[r] = out + out_offsets[p + r] + outputs.first(o);
            }
            Multiply<vectors>(rows, product);
          }
        });
      }
    }
  });
}

constexpr int64_t kGradientPixels = 512;         // that a tile of sums adds before it is stored
constexpr int64_t kGradientChannels = 64;        // of the input in a block
constexpr int64_t kMostPrivateFloats = 4 << 20;  // sums of the kernel that threads keep apart

inline void KernelGradientDirect(Tasks& tasks, const KernelGradient& gradient) {
  const Kernel<float>& kernel = gradient.kernel;
  const Images<const float>& dy = gradient.out;
  const int64_t floats = kernel.h * kernel.w * kernel.inputs * kernel.outputs;
  if (floats == 0) return;
  if (dy.empty()) return FillZeros(kernel);

  const Blocks outputs(kernel.outputs);
  const ChannelParts parts(kernel.inputs, kGradientChannels);
  const PixelBlocks blocks(gradient, CeilDiv(kernel.inputs, parts.count), kGradientPixels,
                           tasks.threads());

  // Where the channels do not share out evenly, the threads share the pixels and sum apart.
  int64_t shares = 1;
  if (parts.count % tasks.threads() != 0) {
    shares = std::clamp<int64_t>(kMostPrivateFloats / floats, 1,
                                 std::min(tasks.threads(), blocks.count()));
  }
  const Scratch apart((shares - 1) * floats);
  const auto sums = [&](int64_t share) -> Kernel<float> {
    if (share == 0) return kernel;
    const int64_t column = kernel.inputs * kernel.outputs;
    return {apart.data() + (share - 1) * floats, kernel.h, kernel.w, kernel.inputs, kernel.outputs,
            kernel.w * column, column, kernel.outputs, 1};
  };

  const auto dy_offsets = blocks.Offsets(dy.image, dy.row, dy.pixel);
  tasks.Run(parts.count * shares, [&](int64_t task) {
    const int64_t part = task / shares, share = task % shares;
    const Kernel<float> sum = sums(share);
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
          product.sums = sum.At(t / taps_of_row, t % taps_of_row, parts.first(part),
                                outputs.first(o));
          WithVectors(outputs.vectors(o),
                      [&](auto vectors) { AddOuterProducts<vectors>(taps.depth, product); });
        }
      }
      product.add = true;
    }
  });

  if (shares > 1) {
    tasks.RunParts(kernel.h * kernel.w * kernel.inputs, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t in = i % kernel.inputs, tap = i / kernel.inputs;
        float* to = kernel.At(tap / kernel.w, tap % kernel.w, in, 0);
        for (int64_t share = 1; share < shares; ++share) {
          const float* from = apart.data() + (share - 1) * floats + i * kernel.outputs;
          for (int64_t o = 0; o < kernel.outputs; ++o) to[o] += from[o];
        }
      }
    });
  }
}

}  // namespace flaxcls
