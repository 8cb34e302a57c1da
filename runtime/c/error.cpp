#include "error.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace qsm::host {

namespace {
thread_local char kept[6144] = "";  // a path of the longest kind, and what is wrong with it
}

std::string text(const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

std::string vector_text(const double (&v)[3]) {
    return text("(%.4g, %.4g, %.4g)", v[0], v[1], v[2]);
}

std::string memory_text(double bytes) {
    const double gib = 1 << 30, mib = 1 << 20;
    return bytes >= gib ? text("%.2f GiB", bytes / gib) : text("%.0f MiB", bytes / mib);
}

std::string last_line(const std::string &message) {
    const size_t end = message.find_last_not_of(" \t\r\n");
    if (end == std::string::npos) return "no reason given";
    const size_t before = message.find_last_of('\n', end);
    return message.substr(before == std::string::npos ? 0 : before + 1, end - before);
}

qsm_status keep(qsm_status status, const char *message) noexcept {
    std::snprintf(kept, sizeof kept, "%s", message);
    std::replace_if(
        kept, kept + std::strlen(kept), [](char c) { return c == '\n' || c == '\r'; }, ' ');
    return status;
}

}  // namespace qsm::host

const char *qsm_last_error(void) { return qsm::host::kept; }
