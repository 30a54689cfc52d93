// Memory for what an operator needs while it runs. It is kept for the next call, up to a bound:
// fresh pages cost more than many of the sums that are written to them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace flaxcls {

class Scratch {
 public:
  explicit Scratch(int64_t floats) : block_(Kept().Take(floats * sizeof(float))) {}
  ~Scratch() { Kept().Give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() const { return static_cast<float*>(block_.memory); }  // 64-byte aligned

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };

  class Store {
   public:
    Block Take(size_t bytes) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        size_t best = blocks_.size();
        for (size_t i = 0; i < blocks_.size(); ++i) {
          const bool fits = blocks_[i].bytes >= bytes && blocks_[i].bytes <= 4 * bytes + kSmall;
          if (fits && (best == blocks_.size() || blocks_[i].bytes < blocks_[best].bytes)) best = i;
        }
        if (best < blocks_.size()) {
          Block found = blocks_[best];
          blocks_.erase(blocks_.begin() + best);
          kept_ -= found.bytes;
          return found;
        }
      }
      const size_t page = bytes >= kHugePage / 4 ? kHugePage : 4096;
      const size_t rounded = (std::max<size_t>(bytes, 1) + page - 1) / page * page;
      void* memory = std::aligned_alloc(page, rounded);
      if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      if (page == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);
#endif
      return {memory, rounded};
    }

    void Give(Block block) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (kept_ + block.bytes <= kMostKept) {
          blocks_.push_back(block);
          kept_ += block.bytes;
          return;
        }
      }
      std::free(block.memory);
    }

   private:
    static constexpr size_t kHugePage = size_t{2} << 20;
    static constexpr size_t kSmall = size_t{64} << 10;
    static constexpr size_t kMostKept = size_t{128} << 20;

    std::mutex mutex_;
    std::vector<Block> blocks_;
    size_t kept_ = 0;
  };

  static Store& Kept() {
    static Store* store = new Store;  // never destroyed: threads may outlive static objects
    return *store;
  }

  Block block_;
};

}  // namespace flaxcls
