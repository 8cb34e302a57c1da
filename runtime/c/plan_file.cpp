#include "plan_file.h"

#include <algorithm>
#include <cstdint>
#include <string_view>

#include "json.h"
#include "session.h"
#include "sha256.h"

namespace qsm::host {

namespace {

constexpr std::string_view kMagic("QSMPLAN\0", 8);
constexpr char kPromised[] = "\"plan\":\"1\"";  // in the canonical card of an engine with a graph
constexpr uint64_t kForm = 1;
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool kUnchecked = true;  // or no fuzzer comes past the digests
#else
constexpr bool kUnchecked = false;
#endif
constexpr size_t kFooter = 112, kDigest = 32, kLongestCard = 4000;

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

uint64_t little_endian(std::string_view bytes, size_t at, size_t size) {
    uint64_t number = 0;
    for (size_t n = size; n-- > 0;) number = number << 8 | uint8_t(bytes[at + n]);
    return number;
}

Error refused(const std::string &path, const std::string &why) {
    return {QSM_ENGINE_ERROR, path + why + "; copy or export it again"};
}

// The card that TensorRT keeps as the network's name, found without TensorRT.
std::string card_text(const std::string &path, const std::string &engine) {
    const size_t start = std::min({engine.find("{\"anchor\":"), engine.find("{\"axes\":"),
                                   engine.find("{\"constants\":")});
    const std::string text =
        start == std::string::npos ? "" : engine.substr(start, kLongestCard);
    for (size_t end = text.find('}'); end != std::string::npos; end = text.find('}', end + 1)) {
        try {
            parse_json(text.substr(0, end + 1));
            return text.substr(0, end + 1);
        } catch (const std::invalid_argument &) {  // it ends later
        }
    }
    throw Error(QSM_ENGINE_ERROR, path + " has no whole model card: it is truncated, or not a plan "
                                         "of qsm-export; export it again");
}

std::string weights_of(const Card &card) {
    return parse_json(card.json).find("weights_sha256")->string;
}

}  // namespace

PlanFile read_plan(const std::string &path) {
    std::string data = read_file(path);
    if (!ends_with(data, kMagic) || data.size() < kFooter) {
        if (data.find(kPromised) != std::string::npos) {
            throw refused(path, ": truncated: its end is missing");
        }
        return {std::move(data), std::nullopt};
    }
    const size_t end = data.size() - kFooter;
    const std::string footer = data.substr(end);
    const uint64_t at = little_endian(footer, 0, 8), length = little_endian(footer, 8, 8);
    const uint64_t graph_at = little_endian(footer, 16, 8);
    const uint64_t graph_length = little_endian(footer, 24, 8);
    const uint64_t form = little_endian(footer, 96, 4), zero = little_endian(footer, 100, 4);
    if (form != kForm || zero != 0) {
        throw Error(QSM_ENGINE_ERROR, path + ": a plan file of form " + std::to_string(form) +
                                          ", this version reads form " + std::to_string(kForm) +
                                          ": update qsm-deploy, or export it again");
    }
    if (at != 0 || length == 0 || length != graph_at || graph_length == 0 || graph_at > end ||
        graph_length != end - graph_at) {
        throw refused(path, ": damaged: its footer tells of an engine of " +
                                std::to_string(length) + " bytes at " + std::to_string(at) +
                                " and a graph of " + std::to_string(graph_length) + " at " +
                                std::to_string(graph_at) + ", where " + std::to_string(end) +
                                " are");
    }
    const std::string_view parts[] = {{data.data(), size_t(length)},
                                      {data.data() + length, size_t(graph_length)}};
    for (size_t n = 0; n < 2; ++n) {
        if (kUnchecked || sha256(parts[n]) == footer.substr(kDigest * (n + 1), kDigest)) continue;
        throw refused(path, std::string(": damaged: its ") + (n ? "graph" : "engine") +
                                " is not what was written (SHA-256)");
    }
    std::string graph(parts[1]);
    data.resize(size_t(length));
    return {std::move(data), std::move(graph)};
}

Error no_graph(const std::string &path, const std::string &engine) {
    const Card card = read_card(path, card_text(path, engine));
    const auto named = card.options.find("engine");
    return {QSM_ENGINE_ERROR,
            path + ": a plan of " + card.network + " in " + card.precision + " for " +
                (named == card.options.end() ? "TensorRT" : named->second) +
                ", of the former form: without a graph it runs on the GPU that it was built for "
                "only; export it again"};
}

void require_same_network(const std::string &path, const std::string &engine, const Card &graph) {
    const Card card = read_card(path, card_text(path, engine));
    if (card.network == graph.network && card.precision == graph.precision &&
        weights_of(card) == weights_of(graph)) {
        return;
    }
    throw Error(QSM_ENGINE_ERROR,
                path + ": its engine and its graph have different cards; export it again");
}

}  // namespace qsm::host
