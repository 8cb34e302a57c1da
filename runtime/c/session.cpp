#include "session.h"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "error.h"

namespace qsm::host {

namespace {
constexpr char kOnnxFirstByte = 0x08;  // the tag of ir_version

template <class Sizes>
std::string shape_text(const Sizes &sizes) {
    std::string all;
    for (const auto size : sizes) all += (all.empty() ? "" : ", ") + std::to_string(size);
    return "(" + all + ")";
}
}

bool is_plan(const std::string &path) { return std::filesystem::path(path).extension() == ".plan"; }

std::string read_file(const std::string &path) {
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(path, ignored)) {
        throw Error(QSM_DATA_ERROR, path + ": no such model file");
    }
    errno = 0;
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::string data(file ? size_t(file.tellg()) : 0, '\0');
    if (file && file.seekg(0).read(data.data(), std::streamsize(data.size()))) return data;
    throw Error(QSM_DATA_ERROR,
                "cannot read " + path + ": " + std::generic_category().message(errno));
}

void require_onnx(const std::string &path, const std::string &graph) {
    if (!graph.empty() && graph[0] == kOnnxFirstByte) return;
    throw Error(QSM_ENGINE_ERROR, path + ": not an .onnx model; make one with qsm-export");
}

void require_output(const Card &card, const std::vector<size_t> &expected,
                    const std::vector<int64_t> &seen, const std::string &type) {
    if (std::equal(seen.begin(), seen.end(), expected.begin(), expected.end()) && type == "f32") {
        return;
    }
    throw Error(QSM_ENGINE_ERROR, "the model of " + card.network + " gives " + shape_text(seen) +
                                      " of " + type + ", its card says " + shape_text(expected) +
                                      " of f32; export the model again");
}

Card read_card(const std::string &path, const std::string &json) {
    if (json.empty()) {
        throw Error(QSM_ENGINE_ERROR, path + " has no model card; export it with qsm-export");
    }
    try {
        Card card = parse_card(json);
        require_supported(card);
        return card;
    } catch (const Error &error) {
        throw Error(error.status, path + ": " + error.what());
    }
}

}  // namespace qsm::host
