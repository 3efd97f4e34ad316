// Where things lie in a KV page: sizes are the same for every ISA.
#include "api.h"

namespace gossamer {

KvLayout kv_layout(Format dtype, int32_t kv_heads, int32_t head_dim, int32_t page_size) {
  return {dtype, kv_heads, head_dim, (head_dim + 15) / 16 * 16, page_size};
}

KvBlock kv_block(const KvLayout& kv) {
  const int64_t data = kBlockTokens * kv.d_pad * format_bits(kv.dtype) / 8;
  const int64_t scale = kv.dtype == Format::int8 ? 4 : kv.dtype == Format::int4 ? 2 : 0;
  const int64_t scales = kBlockTokens * scale;
  return {data, data + scales, data + 2 * scales, 2 * (data + scales)};
}

int64_t kv_page_bytes(const KvLayout& kv) {
  return kv.kv_heads * (kv.page_size / kBlockTokens) * kv_block(kv).bytes;
}

}  // namespace gossamer
