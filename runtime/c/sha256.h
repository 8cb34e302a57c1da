// SHA-256, FIPS 180-4.
#ifndef QSM_RUNTIME_SHA256_H
#define QSM_RUNTIME_SHA256_H

#include <string>
#include <string_view>

namespace qsm::host {

// Returns the 32 bytes of the digest.
std::string sha256(std::string_view data);

}  // namespace qsm::host

#endif
