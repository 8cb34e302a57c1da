// JSON as RFC 8259 has it, read strictly, its text printable ASCII: a model's card, nothing larger.
#ifndef QSM_RUNTIME_JSON_H
#define QSM_RUNTIME_JSON_H

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace qsm::host {

struct Json {
    enum Kind { kNull, kBool, kInteger, kReal, kString, kArray, kObject };

    Kind kind = kNull;
    int64_t integer = 0;  // what does not fit is real
    double number = 0;  // of an integer too
    std::string string;
    std::vector<Json> items;
    std::vector<std::pair<std::string, Json>> fields;

    // Returns a field of an object, or null.
    const Json *find(const std::string &name) const;
};

// Throws std::invalid_argument, which says what is wrong where.
Json parse_json(const std::string &text);

}  // namespace qsm::host

#endif
