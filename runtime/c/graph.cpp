#include "graph.h"

#include <cstdint>
#include <string_view>

#include "error.h"

namespace qsm::host {

namespace {

// Fields of onnx.proto, in a model, a graph, a node and an attribute.
constexpr uint64_t kGraph = 7, kNode = 1, kAttribute = 5, kSubgraph = 6, kSubgraphs = 11;
constexpr uint64_t kNumber = 0, kEightBytes = 1, kLength = 2, kFourBytes = 5;  // what it may hold
constexpr size_t kMostNodes = 100'000;  // the largest network has 3,000

struct Damaged {};

// Takes a number from the front.
uint64_t varint(std::string_view &bytes) {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (bytes.empty()) throw Damaged();
        const uint64_t byte = uint8_t(bytes[0]);
        bytes.remove_prefix(1);
        value |= (byte & 0x7f) << shift;
        if (byte < 0x80) return value;
    }
    throw Damaged();
}

// Takes what a field of this kind holds from the front; "" for a number.
std::string_view content(std::string_view &bytes, uint64_t kind) {
    uint64_t size = 0;
    switch (kind) {
        case kNumber: varint(bytes); break;
        case kLength: size = varint(bytes); break;
        case kEightBytes: size = 8; break;
        case kFourBytes: size = 4; break;
        default: throw Damaged();
    }
    if (size > bytes.size()) throw Damaged();
    const std::string_view found = bytes.substr(0, size);
    bytes.remove_prefix(size);
    return found;
}

// body(content) for the fields of a message that have this number.
template <class Body>
void over_fields(std::string_view message, uint64_t number, Body &&body) {
    while (!message.empty()) {
        const uint64_t tag = varint(message);
        if (tag > UINT32_MAX) throw Damaged();  // libraries cut it off
        const std::string_view found = content(message, tag % 8);
        if (tag / 8 == number && tag % 8 == kLength) body(found);
    }
}

}  // namespace

void require_bounded_graph(const std::string &path, const std::string &onnx) {
    const auto refuse = [&](const std::string &what) {
        throw Error(QSM_ENGINE_ERROR,
                    path + ": its graph has " + what + "; export the network with qsm-export");
    };
    const auto refuse_subgraph = [&](std::string_view) {
        refuse("a loop or a branch, which may never end");
    };
    size_t nodes = 0;
    try {
        over_fields(onnx, kGraph, [&](std::string_view graph) {
            over_fields(graph, kNode, [&](std::string_view node) {
                ++nodes;
                over_fields(node, kAttribute, [&](std::string_view attribute) {
                    over_fields(attribute, kSubgraph, refuse_subgraph);
                    over_fields(attribute, kSubgraphs, refuse_subgraph);
                });
            });
        });
    } catch (const Damaged &) {
        throw Error(QSM_ENGINE_ERROR, path + ": not a valid .onnx model, truncated or damaged: "
                                             "cannot load it; export it again");
    }
    if (nodes > kMostNodes) {
        refuse(std::to_string(nodes) + " nodes, at most " + std::to_string(kMostNodes) +
               " are run");
    }
}

}  // namespace qsm::host
