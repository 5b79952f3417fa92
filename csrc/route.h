// The goals of a loss that backward has to reach, known on the host when it starts.
#pragma once
#include "op.h"

#include <optional>

namespace bomkern {

// A goal without a share in the batch has gradient zero. Autograd skips its branch if that gradient is *undefined*.
// `may` has bit k for each input that may be left out. `groups` is the goal of each input; empty: each input is a goal.
class Owners {
 public:
  Owners() = default;
  Owners(int64_t may, at::IntArrayRef groups) : may_(static_cast<uint64_t>(may)), groups_(groups.begin(), groups.end()) {}

  // Reads the shares [G] of the forward. From a GPU this starts a copy to pinned memory, for which only `holds` waits.
  // Tensors without values, such as fake and meta tensors, leave every branch in.
  void watch(const Tensor& share) {
    if (is_python(share)) return void(may_ = 0);
    if (share.is_cpu()) {
      read(share);
    } else if (share.is_cuda()) {
      host_ = at::empty(share.sizes(), share.options().device(at::kCPU).pinned_memory(true));
      host_.copy_(share, /*non_blocking=*/true);
      ready_.emplace(share.device().type());
      ready_->record(current_stream(share.device()));
    } else {
      may_ = 0;
    }
  }

  // Reads the winners on the CPU: one for each sample, or [1] the position of the worst entry in [B, goals].
  void watch_winners(const Tensor& winner, int64_t goals) {
    if (!winner.is_cpu() || is_python(winner)) return void(may_ = 0);
    if (winner.scalar_type() == at::kLong) return void(owned_ = uint64_t(1) << (*winner.const_data_ptr<int64_t>() % goals));
    uint8_t seen[64] = {};
    const uint8_t* begin = winner.const_data_ptr<uint8_t>();
    for (const uint8_t* w = begin; w < begin + winner.numel(); ++w) seen[*w] = 1;
    for (int k = 0; k < 64; ++k) owned_ |= uint64_t(seen[k]) << k;
  }

  // Returns whether backward has to reach input k.
  bool holds(size_t k) {
    if (!(may_ >> k & 1)) return true;
    if (ready_) {
      ready_->synchronize();
      ready_.reset();
      read(host_);
    }
    return owned_ >> (groups_.empty() ? k : static_cast<size_t>(groups_[k])) & 1;
  }

 private:
  void read(const Tensor& share) {
    with_number(share.scalar_type() == at::kDouble, [&](auto zero) {
      const auto* begin = share.const_data_ptr<decltype(zero)>();
      for (int64_t g = 0; g < share.numel(); ++g) owned_ |= uint64_t(begin[g] != 0) << g;  // NaN counts as a share
    });
  }

  uint64_t may_ = 0, owned_ = 0;
  c10::SmallVector<int64_t, 16> groups_;
  Tensor host_;
  std::optional<c10::Event> ready_;
};

}  // namespace bomkern
