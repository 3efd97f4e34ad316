// A streaming read, for the probe: `streams` equal parts of a range side by side, each `ahead` bytes behind
// its prefetches. Which of them is fastest is the machine's secret, so the probe tries several.

template <int STREAMS>
GOSSAMER_INLINE uint32_t read_streams(const char* data, int64_t bytes, int64_t ahead) {
  constexpr int kLines = 4;  // of one stream in turn
  const int64_t part = bytes / STREAMS;
  nu sum[STREAMS][kParts] = {};
  for (int64_t i = 0; i < part; i += kLines * 64) {
    for (int s = 0; s < STREAMS; s++) {
      const char* from = data + s * part + i;
      for (int line = 0; line < kLines; line++) {
        if (ahead) __builtin_prefetch(from + ahead + line * 64);
        for (int p = 0; p < kParts; p++) {
          sum[s][p] += *reinterpret_cast<const nu*>(from + line * 64 + p * kBytes);
        }
      }
    }
  }
  nu total = sum[0][0];
  for (int s = 0; s < STREAMS; s++) {
    for (int p = s == 0; p < kParts; p++) total += sum[s][p];
  }
  uint32_t all = 0;
  for (int lane = 0; lane < kPartLanes; lane++) all += total[lane];
  return all;
}

// Every byte of data, 64-byte aligned; bytes is a multiple of 512, streams 1 or 2. The sum of its 32-bit
// words, which keeps the compiler from dropping the loads.
inline uint32_t read(const void* data, int64_t bytes, int streams, int64_t ahead) {
  const char* from = static_cast<const char*>(data);
  return streams == 1 ? read_streams<1>(from, bytes, ahead) : read_streams<2>(from, bytes, ahead);
}
