#include "sha256.h"

#include <cstdint>

namespace qsm::host {

namespace {

constexpr size_t kBlock = 64, kLengthAt = 56;

constexpr uint32_t kRounds[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

uint32_t rotated(uint32_t x, int n) { return x >> n | x << (32 - n); }

void add_block(uint32_t (&state)[8], const char *block) {
    uint32_t w[64];
    for (size_t n = 0; n < 16; ++n) {
        w[n] = 0;
        for (size_t byte = 4 * n; byte < 4 * n + 4; ++byte) w[n] = w[n] << 8 | uint8_t(block[byte]);
    }
    for (size_t n = 16; n < 64; ++n) {
        const uint32_t a = w[n - 15], b = w[n - 2];
        w[n] = w[n - 16] + (rotated(a, 7) ^ rotated(a, 18) ^ a >> 3) + w[n - 7] +
               (rotated(b, 17) ^ rotated(b, 19) ^ b >> 10);
    }
    uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    for (size_t n = 0; n < 64; ++n) {
        const uint32_t one = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) +
                             ((e & f) ^ (~e & g)) + kRounds[n] + w[n];
        const uint32_t two = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) +
                             ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + one;
        d = c, c = b, b = a, a = one + two;
    }
    const uint32_t worked[] = {a, b, c, d, e, f, g, h};
    for (size_t n = 0; n < 8; ++n) state[n] += worked[n];
}

void append_big_endian(std::string &to, uint64_t number, int bytes) {
    for (int n = bytes; n-- > 0;) to += char(number >> 8 * n & 0xff);
}

}  // namespace

std::string sha256(std::string_view data) {
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    const size_t whole = data.size() - data.size() % kBlock;
    for (size_t at = 0; at < whole; at += kBlock) add_block(state, data.data() + at);
    std::string end(data.substr(whole));
    end += '\x80';
    while (end.size() % kBlock != kLengthAt) end += '\0';
    append_big_endian(end, uint64_t{8} * data.size(), 8);
    for (size_t at = 0; at < end.size(); at += kBlock) add_block(state, end.data() + at);
    std::string digest;
    for (const uint32_t word : state) append_big_endian(digest, word, 4);
    return digest;
}

}  // namespace qsm::host
