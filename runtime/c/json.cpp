#include "json.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <system_error>

namespace qsm::host {

namespace {

constexpr int kDeepest = 32;

class Reader {
  public:
    explicit Reader(const std::string &text) : text_(text) {}

    Json whole() {
        Json value = read(0);
        skip_space();
        if (at_ < text_.size()) fail("more after its end");
        return value;
    }

  private:
    [[noreturn]] void fail(const std::string &what) const {
        throw std::invalid_argument(what + " at character " + std::to_string(at_));
    }

    void skip_space() { at_ = std::min(text_.find_first_not_of(" \t\r\n", at_), text_.size()); }

    // The next character after any space, 0 at the end.
    char next() {
        skip_space();
        return at_ < text_.size() ? text_[at_] : '\0';
    }

    bool take(char wanted) {
        if (next() != wanted) return false;
        ++at_;
        return true;
    }

    void require(char wanted) {
        if (!take(wanted)) fail(std::string("expected ") + wanted);
    }

    Json read(int depth) {
        if (depth > kDeepest) fail("too deep");
        switch (next()) {
            case '{':
                return object(depth);
            case '[':
                return array(depth);
            case '"': {
                Json value;
                value.kind = Json::kString;
                value.string = string();
                return value;
            }
            default:
                return number_or_word();
        }
    }

    Json object(int depth) {
        Json value;
        value.kind = Json::kObject;
        require('{');
        if (take('}')) return value;
        do {
            if (next() != '"') fail("expected a name");
            std::string name = string();
            if (value.find(name)) fail("a second " + name);
            require(':');
            value.fields.emplace_back(std::move(name), read(depth + 1));
        } while (take(','));
        require('}');
        return value;
    }

    Json array(int depth) {
        Json value;
        value.kind = Json::kArray;
        require('[');
        if (take(']')) return value;
        do {
            value.items.push_back(read(depth + 1));
        } while (take(','));
        require(']');
        return value;
    }

    std::string string() {
        std::string value;
        for (++at_; at_ < text_.size() && text_[at_] != '"'; ++at_) {
            if (static_cast<unsigned char>(text_[at_]) < 0x20) fail("a control character");
            if (text_[at_] == '\\') {
                escape(value);
            } else {
                value += text_[at_];
            }
        }
        if (at_ == text_.size()) fail("a string without end");
        ++at_;
        return value;
    }

    // Leaves at_ on the escape's last character.
    void escape(std::string &value) {
        static const char names[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        const char name = ++at_ < text_.size() ? text_[at_] : '\0';
        if (const char *found = name ? std::strchr(names, name) : nullptr) {
            value += meanings[found - names];
            return;
        }
        if (name != 'u') fail("an unknown escape");
        unsigned code = hex4();
        if (code >= 0xd800 && code < 0xdc00 && text_.compare(at_ + 1, 2, "\\u") == 0) {
            at_ += 2;
            code = 0x10000 + ((code - 0xd800) << 10) + (hex4() - 0xdc00);
        }
        append_utf8(code, value);
    }

    unsigned hex4() {
        unsigned code = 0;
        for (int digit = 0; digit < 4; ++digit) {
            const char c = ++at_ < text_.size() ? text_[at_] : '\0';
            const char *digits = "0123456789abcdef";
            const char *found =
                c ? std::strchr(digits, c | ('A' <= c && c <= 'F' ? 0x20 : 0)) : nullptr;
            if (!found) fail("expected four hexadecimal digits");
            code = code * 16 + static_cast<unsigned>(found - digits);
        }
        return code;
    }

    static void append_utf8(unsigned code, std::string &value) {
        const auto tail = [&](int shift) {
            value += static_cast<char>(0x80 | ((code >> shift) & 0x3f));
        };
        if (code < 0x80) {
            value += static_cast<char>(code);
        } else if (code < 0x800) {
            value += static_cast<char>(0xc0 | (code >> 6));
            tail(0);
        } else if (code < 0x10000) {
            value += static_cast<char>(0xe0 | (code >> 12));
            tail(6), tail(0);
        } else {
            value += static_cast<char>(0xf0 | ((code >> 18) & 7));
            tail(12), tail(6), tail(0);
        }
    }

    Json number_or_word() {
        const size_t end = text_.find_first_of(" \t\r\n,]}:", at_);
        const std::string word = text_.substr(at_, end == std::string::npos ? end : end - at_);
        Json value;
        if (word == "true" || word == "false") {
            value.kind = Json::kBool;
            value.boolean = word == "true";
        } else if (word != "null") {
            number(word, value);
        }
        at_ += word.size();
        return value;
    }

    void number(const std::string &word, Json &value) const {
        size_t at = word[0] == '-' ? 1 : 0;
        const auto digits = [&] {
            const size_t first = at;
            while (at < word.size() && word[at] >= '0' && word[at] <= '9') ++at;
            return at - first;
        };
        const size_t first = at, whole = digits();
        bool right = whole == 1 || (whole > 1 && word[first] != '0');
        value.kind = Json::kInteger;
        if (right && at < word.size() && word[at] == '.') {
            ++at;
            right = digits() > 0;
            value.kind = Json::kReal;
        }
        if (right && at < word.size() && (word[at] == 'e' || word[at] == 'E')) {
            ++at;
            if (at < word.size() && (word[at] == '+' || word[at] == '-')) ++at;
            right = digits() > 0;
            value.kind = Json::kReal;
        }
        if (!right || at < word.size()) fail("expected a value");
        // Not strtod, which reads as the host's locale says.
        const char *begin = word.c_str(), *end = begin + word.size();
        std::errc error = std::from_chars(begin, end, value.number).ec;
        if (error == std::errc() && value.kind == Json::kInteger) {
            error = std::from_chars(begin, end, value.integer).ec;
        }
        if (error != std::errc()) fail("a number too large");
    }

    const std::string &text_;
    size_t at_ = 0;
};

}  // namespace

const Json *Json::find(const std::string &name) const {
    for (const auto &[key, value] : fields) {
        if (key == name) return &value;
    }
    return nullptr;
}

Json parse_json(const std::string &text) { return Reader(text).whole(); }

}  // namespace qsm::host
