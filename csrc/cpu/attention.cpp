#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "../simd.hpp"
#include "parallel.hpp"
#include "product.hpp"

namespace llm::cpu {
namespace {

constexpr std::int64_t kGroup = 4;  // tiles of queries that share a pass over the keys

constexpr std::int64_t tiles_of(std::int64_t rows, std::int64_t tile = kTile) { return (rows + tile - 1) / tile; }

// fp32 copies with contiguous rows of each head: [B, H, rows, D]. The number of rows is a multiple of the tile; the
// last rows may be zeros.
class Packed {
 public:
  Packed(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d)
      : heads_(h),
        rows_(tiles_of(s) * kTile),
        d_(d),
        memory_(static_cast<float*>(::operator new(b * h * rows_ * d * sizeof(float), kAlignment))) {}

  float* at(std::int64_t batch, std::int64_t head, std::int64_t row) const {
    return memory_.get() + ((batch * heads_ + head) * rows_ + row) * d_;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };

  std::int64_t heads_, rows_, d_;
  std::unique_ptr<float, Free> memory_;
};

struct Packing {
  const AttentionShape& shape;
  std::int64_t s, h;
  const Heads& from;
  const Packed& to;
};

// Copies a tile of rows of all heads in memory order: the rows of one head are a page apart, and going from page to
// page takes longer than a product.
template <int Lanes, typename T>
LLM_INLINE void pack_tile(const Packing& a, std::int64_t unit) {
  const std::int64_t tiles = tiles_of(a.s), batch = unit / tiles, first = unit % tiles * kTile;
  for (std::int64_t row = first; row < first + kTile; ++row) {
    for (std::int64_t head = 0; head < a.h; ++head) {
      const T* from = a.from.at<T>(batch, row, head);
      float* to = a.to.at(batch, head, row);
      for (std::int64_t c = 0; c < a.shape.d; c += Lanes) {
        Floats<Lanes> x = {};
        if (row < a.s) load<Lanes>(from + c, x);
        store<Lanes>(to + c, x);
      }
    }
  }
}

// Which keys the queries of a tile see.
struct Tile {
  std::int64_t first, rows;  // queries first .. first + rows - 1
  std::int64_t begin, end;   // the keys that some query sees
  std::int64_t full, rest;   // every query sees the keys full .. rest - 1
  std::int32_t oldest[kTile], newest[kTile];

  LLM_INLINE void set(const AttentionShape& s, std::int64_t batch, std::int64_t query) {
    first = query;
    rows = std::min(kTile, s.sq - first);
    const std::int64_t ahead = s.sk - s.sq;
    const std::int32_t* starts = s.doc_start == nullptr ? nullptr : s.doc_start + batch * s.sq + first;
    for (std::int64_t i = 0; i < kTile; ++i) {
      oldest[i] = starts == nullptr || i >= rows ? 0 : starts[i];
      newest[i] = static_cast<std::int32_t>(i >= rows ? -1 : s.causal ? ahead + first + i : s.sk - 1);
    }
    begin = std::max<std::int64_t>(oldest[0], 0);
    full = std::max<std::int64_t>(oldest[rows - 1], 0);
    rest = rows < kTile ? 0 : newest[0] + std::int64_t{1};  // queries that only fill up the tile see nothing
    end = newest[rows - 1] + std::int64_t{1};
  }

  bool sees_all(std::int64_t key, std::int64_t keys) const { return key >= full && key + keys <= rest; }

  // Sets the scores of keys that a query does not see to -inf.
  template <int Lanes>
  LLM_INLINE void mask(std::int64_t key, std::int64_t query, Floats<Lanes>& scores) const {
    Ints<Lanes> first_seen, last_seen;
    load<Lanes>(oldest + query, first_seen);
    load<Lanes>(newest + query, last_seen);
    const Ints<Lanes> at = Ints<Lanes>{} + static_cast<std::int32_t>(key);
    const Floats<Lanes> hidden = Floats<Lanes>{} - __builtin_inff();
    scores = ((at >= first_seen) & (at <= last_seen)) ? scores : hidden;
  }
};

// Consecutive tiles, which use a block of keys while it is in the cache.
struct Group {
  std::int64_t tiles = 0, begin, end;  // keys begin .. end - 1: those that some tile sees
  Tile tile[kGroup];

  LLM_INLINE Group(const AttentionShape& s, std::int64_t batch, std::int64_t first) {
    for (; tiles < kGroup && first + tiles * kTile < s.sq; ++tiles) tile[tiles].set(s, batch, first + tiles * kTile);
    begin = tile[0].begin;
    end = tile[tiles - 1].end;
  }
};

// Working memory of a thread, kept between calls.
LLM_INLINE float* scratch(std::int64_t floats) {
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(floats) + 16) memory.resize(static_cast<std::size_t>(floats) + 16);
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (64 - address % 64) % 64 / 4;
}

// The sums of a tile of queries so far.
struct Running {
  float top[kTile], total[kTile];  // per query: the highest score, and the sum of 2^(score - top)
};

// p = the unnormalised probabilities of `keys` keys from `key` on, transposed; scales `out` to the new tops.
template <int Lanes>
LLM_INLINE void softmax(const Tile& tile, std::int64_t key, std::int64_t keys, std::int64_t d, float* p, float* out,
                        Running& running) {
  const bool masked = !tile.sees_all(key, keys);
  float shrink[kTile];
  bool grows = false;
  for (std::int64_t i = 0; i < kTile; i += Lanes) {
    Floats<Lanes> before, highest, sum, x;
    load<Lanes>(running.top + i, before);
    highest = before;
    for (std::int64_t j = 0; j < keys; ++j) {
      load<Lanes>(p + j * kTile + i, x);
      if (masked) {
        tile.mask<Lanes>(key + j, i, x);
        store<Lanes>(p + j * kTile + i, x);
      }
      maximum<Lanes>(x, highest);
    }
    Floats<Lanes> ratio = before - highest;
    exp2<Lanes>(ratio);
    load<Lanes>(running.total + i, sum);
    sum *= ratio;
    for (std::int64_t j = 0; j < keys; ++j) {
      load<Lanes>(p + j * kTile + i, x);
      x -= highest;
      exp2<Lanes>(x);
      sum += x;
      store<Lanes>(p + j * kTile + i, x);
    }
    store<Lanes>(running.top + i, highest);
    store<Lanes>(running.total + i, sum);
    store<Lanes>(shrink + i, ratio);
    for (int lane = 0; lane < Lanes; ++lane) grows |= shrink[i + lane] != 1.0f;
  }
  if (!grows || key <= tile.begin) return;
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    for (std::int64_t c = 0; c < d; c += Lanes) {
      Floats<Lanes> x;
      load<Lanes>(out + i * d + c, x);
      x *= shrink[i];
      store<Lanes>(out + i * d + c, x);
    }
  }
}

struct Forward {
  const AttentionForward& given;
  Packed q, k, v;
};

template <int Lanes, typename T>
LLM_INLINE void forward_group(const Forward& f, std::int64_t unit) {
  const AttentionForward& a = f.given;
  const AttentionShape& s = a.shape;
  const std::int64_t groups = tiles_of(s.sq, kGroup * kTile), d = s.d, block = kTile * d;
  const std::int64_t heads = unit % (s.b * s.hq), batch = heads / s.hq, head = heads % s.hq;
  const Group group(s, batch, (groups - 1 - unit / (s.b * s.hq)) * kGroup * kTile);  // the longest ones first
  float* p = scratch(2 * kGroup * block + kTile * kTile);
  float *q_t = p + kTile * kTile, *out = q_t + kGroup * block;
  Running running[kGroup];
  for (std::int64_t t = 0; t < group.tiles; ++t) {
    transpose<Lanes>(f.q.at(batch, head, group.tile[t].first), d, s.scale * kLog2E, q_t + t * block);
    std::fill_n(out + t * block, block, 0.0f);
    std::fill_n(running[t].top, kTile, -1e38f);  // finite, because -inf gives NaN if a query sees no key
    std::fill_n(running[t].total, kTile, 0.0f);
  }

  const std::int64_t kv_head = head / (s.hq / s.hkv);
  for (std::int64_t key = group.begin; key < group.end; key += kTile) {
    for (std::int64_t t = 0; t < group.tiles; ++t) {
      const Tile& tile = group.tile[t];
      const std::int64_t first = std::max(key, tile.begin), keys = std::min(key + kTile, tile.end) - first;
      if (keys <= 0) continue;
      multiply<Lanes>(f.k.at(batch, kv_head, first), q_t + t * block, p, keys, d);
      softmax<Lanes>(tile, first, keys, d, p, out + t * block, running[t]);
      const float* v = f.v.at(batch, kv_head, first);
      multiply_add<Lanes>(p, 1, kTile, v, d, out + t * block, d, tile.rows, d, keys);
    }
  }

  for (std::int64_t t = 0; t < group.tiles; ++t) {
    const Tile& tile = group.tile[t];
    T* to = static_cast<T*>(a.out) + ((batch * s.sq + tile.first) * s.hq + head) * d;
    float* lse = a.lse + heads * s.sq + tile.first;
    for (std::int64_t i = 0; i < tile.rows; ++i) {
      const float total = running[t].total[i];
      const bool none = total == 0.0f;
      lse[i] = none ? __builtin_inff() : running[t].top[i] + std::log2(total);
      const float inverse = none ? 0.0f : 1.0f / total;
      for (std::int64_t c = 0; c < d; c += Lanes) {
        Floats<Lanes> x;
        load<Lanes>(out + t * block + i * d + c, x);
        x *= inverse;
        store<Lanes>(to + i * s.hq * d + c, x);
      }
    }
  }
}

// p = the probabilities of `keys` keys from `key` on, transposed; turns dp into the gradient of the scores.
template <int Lanes>
LLM_INLINE void softmax_backward(const Tile& tile, std::int64_t key, std::int64_t keys, const float* lse,
                                 const float* delta, float* p, float* dp) {
  const bool masked = !tile.sees_all(key, keys);
  for (std::int64_t i = 0; i < kTile; i += Lanes) {
    Floats<Lanes> base, mean;
    load<Lanes>(lse + i, base);
    load<Lanes>(delta + i, mean);
    for (std::int64_t j = 0; j < keys; ++j) {
      Floats<Lanes> x, y;
      load<Lanes>(p + j * kTile + i, x);
      load<Lanes>(dp + j * kTile + i, y);
      x -= base;
      if (masked) tile.mask<Lanes>(key + j, i, x);
      exp2<Lanes>(x);
      y = x * (y - mean);
      store<Lanes>(p + j * kTile + i, x);
      store<Lanes>(dp + j * kTile + i, y);
    }
  }
}

struct Backward {
  const AttentionBackward& given;
  Packed q, k, v, dout;
  Packed delta;   // [B, Hq, Sq, 1]: the sum of dout * out
  Packed dk, dv;  // [B, Hq, Sk, D], per query head
};

// Computes delta of a tile of queries of every head.
template <int Lanes, typename T>
LLM_INLINE void sum_delta(const Backward& f, std::int64_t unit) {
  const AttentionShape& s = f.given.shape;
  const std::int64_t tiles = tiles_of(s.sq), batch = unit / tiles, first = unit % tiles * kTile;
  for (std::int64_t row = first; row < std::min(first + kTile, s.sq); ++row) {
    const T* out = static_cast<const T*>(f.given.out) + (batch * s.sq + row) * s.hq * s.d;
    for (std::int64_t head = 0; head < s.hq; ++head) {
      const float* dout = f.dout.at(batch, head, row);
      Floats<Lanes> total = {};
      for (std::int64_t c = 0; c < s.d; c += Lanes) {
        Floats<Lanes> x, y;
        load<Lanes>(dout + c, x);
        load<Lanes>(out + head * s.d + c, y);
        total += x * y;
      }
      *f.delta.at(batch, head, row) = sum<Lanes>(total);
    }
  }
}

// Computes dq of one query head, and its share of the gradients of keys and values.
template <int Lanes, typename T>
LLM_INLINE void backward_head(const Backward& f, std::int64_t unit) {
  const AttentionBackward& a = f.given;
  const AttentionShape& s = a.shape;
  const std::int64_t d = s.d, batch = unit / s.hq, head = unit % s.hq, kv_head = head / (s.hq / s.hkv);
  const std::int64_t block = kTile * d;
  float* p = scratch(3 * kGroup * block + 2 * kTile * kTile);
  float *ds = p + kTile * kTile, *q_t = ds + kTile * kTile, *dout_t = q_t + kGroup * block;
  float* dq = dout_t + kGroup * block;
  float lse[kGroup][kTile], delta[kGroup][kTile];
  std::fill_n(f.dk.at(batch, head, 0), s.sk * d, 0.0f);
  std::fill_n(f.dv.at(batch, head, 0), s.sk * d, 0.0f);
  for (std::int64_t query = 0; query < s.sq; query += kGroup * kTile) {
    const Group group(s, batch, query);
    for (std::int64_t t = 0; t < group.tiles; ++t) {
      const Tile& tile = group.tile[t];
      transpose<Lanes>(f.q.at(batch, head, tile.first), d, s.scale * kLog2E, q_t + t * block);
      transpose<Lanes>(f.dout.at(batch, head, tile.first), d, 1.0f, dout_t + t * block);
      for (std::int64_t i = 0; i < kTile; ++i) {
        lse[t][i] = i < tile.rows ? a.lse[unit * s.sq + tile.first + i] : __builtin_inff();
        delta[t][i] = i < tile.rows ? *f.delta.at(batch, head, tile.first + i) : 0.0f;
      }
      std::fill_n(dq + t * block, block, 0.0f);
    }
    for (std::int64_t key = group.begin; key < group.end; key += kTile) {
      for (std::int64_t t = 0; t < group.tiles; ++t) {
        const Tile& tile = group.tile[t];
        const std::int64_t first = std::max(key, tile.begin), keys = std::min(key + kTile, tile.end) - first;
        if (keys <= 0) continue;
        const float *q = f.q.at(batch, head, tile.first), *dout = f.dout.at(batch, head, tile.first);
        const float *k = f.k.at(batch, kv_head, first), *v = f.v.at(batch, kv_head, first);
        float *dk = f.dk.at(batch, head, first), *dv = f.dv.at(batch, head, first);
        multiply<Lanes>(k, q_t + t * block, p, keys, d);
        multiply<Lanes>(v, dout_t + t * block, ds, keys, d);
        softmax_backward<Lanes>(tile, first, keys, lse[t], delta[t], p, ds);
        multiply_add<Lanes>(p, kTile, 1, dout, d, dv, d, keys, d, tile.rows);
        multiply_add<Lanes>(ds, kTile, 1, q, d, dk, d, keys, d, tile.rows);
        multiply_add<Lanes>(ds, 1, kTile, k, d, dq + t * block, d, tile.rows, d, keys);
      }
    }
    for (std::int64_t t = 0; t < group.tiles; ++t) {
      T* to = static_cast<T*>(a.dq) + ((batch * s.sq + group.tile[t].first) * s.hq + head) * d;
      for (std::int64_t i = 0; i < group.tile[t].rows; ++i) {
        for (std::int64_t c = 0; c < d; c += Lanes) {
          Floats<Lanes> x;
          load<Lanes>(dq + t * block + i * d + c, x);
          x *= s.scale;
          store<Lanes>(to + i * s.hq * d + c, x);
        }
      }
    }
  }
}

// Computes the gradients of a tile of keys of every KV head, summed over its query heads.
template <int Lanes, typename T>
LLM_INLINE void sum_heads(const Backward& f, std::int64_t unit) {
  const AttentionBackward& a = f.given;
  const AttentionShape& s = a.shape;
  const std::int64_t tiles = tiles_of(s.sk), group = s.hq / s.hkv, d = s.d;
  const std::int64_t batch = unit / tiles, first = unit % tiles * kTile;
  for (std::int64_t row = first; row < std::min(first + kTile, s.sk); ++row) {
    for (std::int64_t kv_head = 0; kv_head < s.hkv; ++kv_head) {
      const std::int64_t to = ((batch * s.sk + row) * s.hkv + kv_head) * d;
      for (std::int64_t c = 0; c < d; c += Lanes) {
        Floats<Lanes> dk = {}, dv = {};
        for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          Floats<Lanes> x;
          load<Lanes>(f.dk.at(batch, head, row) + c, x);
          dk += x;
          load<Lanes>(f.dv.at(batch, head, row) + c, x);
          dv += x;
        }
        dk *= s.scale;
        store<Lanes>(static_cast<T*>(a.dk) + to + c, dk);
        store<Lanes>(static_cast<T*>(a.dv) + to + c, dv);
      }
    }
  }
}

struct Kernels {
  void (*pack_tile)(const Packing&, std::int64_t);
  void (*forward_group)(const Forward&, std::int64_t);
  void (*sum_delta)(const Backward&, std::int64_t);
  void (*backward_head)(const Backward&, std::int64_t);
  void (*sum_heads)(const Backward&, std::int64_t);
};

#define LLM_VARIANT(name, target, lanes)                                                                    \
  template <typename T>                                                                                     \
  struct name {                                                                                             \
    target static void pack(const Packing& a, std::int64_t unit) { pack_tile<lanes, T>(a, unit); }          \
    target static void forward(const Forward& a, std::int64_t unit) { forward_group<lanes, T>(a, unit); }   \
    target static void delta(const Backward& a, std::int64_t unit) { sum_delta<lanes, T>(a, unit); }        \
    target static void backward(const Backward& a, std::int64_t unit) { backward_head<lanes, T>(a, unit); } \
    target static void heads(const Backward& a, std::int64_t unit) { sum_heads<lanes, T>(a, unit); }        \
    static Kernels kernels() { return {pack, forward, delta, backward, heads}; }                            \
  }

LLM_VARIANT(Portable, , 4);
LLM_VARIANT(Avx2, LLM_TARGET_AVX2, 8);
LLM_VARIANT(Avx512, LLM_TARGET_AVX512, 16);

template <typename T>
Kernels best() {
  return best_kernels<Portable<T>, Avx2<T>, Avx512<T>>();
}

const Kernels& kernels(bool bf16) {
  static const Kernels of_fp32 = best<float>(), of_bf16 = best<Bf16>();
  return bf16 ? of_bf16 : of_fp32;
}

Packed packed(const AttentionShape& s, std::int64_t rows, std::int64_t heads, const Heads& from) {
  Packed to(s.b, heads, rows, s.d);
  parallel(s.b * tiles_of(rows), s.threads, kernels(s.bf16).pack_tile, Packing{s, rows, heads, from, to});
  return to;
}

}  // namespace

void attention_forward(const AttentionForward& a) {
  const AttentionShape& s = a.shape;
  const Forward call{a, packed(s, s.sq, s.hq, a.q), packed(s, s.sk, s.hkv, a.k), packed(s, s.sk, s.hkv, a.v)};
  parallel(tiles_of(s.sq, kGroup * kTile) * s.b * s.hq, s.threads, kernels(s.bf16).forward_group, call);
}

void attention_backward(const AttentionBackward& a) {
  const AttentionShape& s = a.shape;
  const Backward call{a,
                      packed(s, s.sq, s.hq, a.q),
                      packed(s, s.sk, s.hkv, a.k),
                      packed(s, s.sk, s.hkv, a.v),
                      packed(s, s.sq, s.hq, a.dout),
                      Packed(s.b, s.hq, s.sq, 1),
                      Packed(s.b, s.hq, s.sk, s.d),
                      Packed(s.b, s.hq, s.sk, s.d)};
  parallel(s.b * tiles_of(s.sq), s.threads, kernels(s.bf16).sum_delta, call);
  parallel(s.b * s.hq, s.threads, kernels(s.bf16).backward_head, call);
  parallel(s.b * tiles_of(s.sk), s.threads, kernels(s.bf16).sum_heads, call);
}

}  // namespace llm::cpu
