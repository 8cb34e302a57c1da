#include "session.h"

#include <filesystem>
#include <fstream>

#include "error.h"

namespace qsm::host {

namespace {
constexpr int kOnnxFirstByte = 0x08;  // the tag of ir_version
}

bool is_plan(const std::string &path) { return std::filesystem::path(path).extension() == ".plan"; }

void require_file(const std::string &path) {
    std::error_code ignored;
    if (std::filesystem::is_regular_file(path, ignored)) return;
    throw Error(QSM_DATA_ERROR, path + ": no such model file");
}

void require_onnx_file(const std::string &path) {
    require_file(path);
    std::ifstream file(path, std::ios::binary);
    if (file.get() != kOnnxFirstByte) {
        throw Error(QSM_ENGINE_ERROR, path + ": not an ONNX model; make one with qsm-export");
    }
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
