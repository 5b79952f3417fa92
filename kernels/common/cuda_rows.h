// Kernels that reduce along rows: a team of threads to a row, few for short rows and a whole block for long ones.
#pragma once
#include "cuda_launch.h"
#include "cuda_pieces.h"
#include "cuda_tune.h"

namespace bomkern {
namespace BOMKERN_ISA {

constexpr int row_threads = 256, long_row_threads = 512;  // of a block
constexpr size_t row_shared = long_row_threads / 32 * sizeof(double);

// The mapping of a grid to the rows.
struct Teams {
  int lanes;    // threads of a row: a power of 2 up to 32, or the whole block
  int shift;    // its logarithm
  int threads;  // of a block
  int64_t blocks;
};

// Too few for the warps of a large device; the same on any, so that the bits are.
BOMKERN_SHARED_THRESHOLD few_rows = 1024;
BOMKERN_SHARED_THRESHOLD most_row_blocks = 16;  // for each multiprocessor; a team takes one row after another

inline Teams teams_of(int64_t batch, int64_t pieces, int64_t places) {
  Teams t{};
  t.threads = pieces >= 4096 ? long_row_threads : row_threads;
  // A warp goes over up to 16 pieces a thread while there are rows for all warps; else the block shares the row.
  const bool whole_block = pieces > 512 || (pieces >= 128 && batch < few_rows);
  t.lanes = whole_block ? t.threads : power_of_2(pieces, 32);
  t.shift = log2_of(t.lanes);
  const int64_t wanted = ceil_div(batch, t.threads / t.lanes), most = places * most_row_blocks;
  t.blocks = wanted < most ? wanted : most;
  return t;
}

// A thread's team in its block, and its lane in the team.
struct Member {
  int team, lane, teams;
  BOMKERN_HD explicit Member(const Teams& t)
      : team(threadIdx.x >> t.shift), lane(threadIdx.x & (t.lanes - 1)), teams(t.threads >> t.shift) {}
};

}  // namespace BOMKERN_ISA
}  // namespace bomkern

// See cuda_tune.h.
BOMKERN_EXPORT_SHARED int64_t bomkern_tune_rows(const char* name, int64_t value) {
  using namespace bomkern::cuda;
  return tune({{"few_rows", &few_rows}, {"most_row_blocks", &most_row_blocks}}, name, value);
}
