// One request to a policy server from C++17, without any library.
//   g++ -std=c++17 -O1 client.cpp -o client && ./client localhost 8000
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef MSG_NOSIGNAL  // macOS has an option of the socket instead
#define MSG_NOSIGNAL 0
#endif

// msgpack, as much of it as a request needs; arrays as openpi's msgpack-numpy writes them.
struct Packer {
    std::string out;
    void byte(int b) { out.push_back(static_cast<char>(b)); }
    void big_endian(std::uint64_t n, int bytes) {
        while (bytes--) byte(n >> (8 * bytes) & 0xff);
    }
    void map(int n) { byte(0xde), big_endian(n, 2); }
    void text(const std::string& s) { byte(0xdb), big_endian(s.size(), 4), out += s; }
    void bytes(const void* data, std::size_t n) {
        byte(0xc6), big_endian(n, 4), out.append(static_cast<const char*>(data), n);
    }
    void tag(const char* name) { bytes(name, std::strlen(name)); }
    // dtype as NumPy spells it: "|u1" for uint8, "<f8" for float64, "<f4" for float32.
    template <class T>
    void array(const std::vector<std::uint32_t>& shape, const char* dtype,
               const std::vector<T>& values) {
        map(4);
        tag("__ndarray__"), byte(0xc3);
        tag("data"), bytes(values.data(), values.size() * sizeof(T));
        tag("dtype"), text(dtype);
        tag("shape"), byte(0xdd), big_endian(shape.size(), 4);
        for (auto n : shape) byte(0xce), big_endian(n, 4);
    }
};

// A websocket client for servers one trusts: no fragments, no pings of its own.
struct Socket {
    int fd = -1;
    Socket(const char* host, const char* port) {
        addrinfo hints{}, *found = nullptr;
        hints.ai_socktype = SOCK_STREAM;
        if (getaddrinfo(host, port, &hints, &found)) throw std::runtime_error("no such host");
        for (auto a = found; a && fd < 0; a = a->ai_next) {
            fd = socket(a->ai_family, a->ai_socktype, a->ai_protocol);
            if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen)) close(fd), fd = -1;
        }
        freeaddrinfo(found);
        if (fd < 0) throw std::runtime_error("nobody listens there");
#ifdef SO_NOSIGPIPE
        int on = 1;
        setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
        write("GET / HTTP/1.1\r\nHost: " + std::string(host) +
              "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
              "Sec-WebSocket-Key: c2FtcGxlIGNsaWVudCEhIQ==\r\n\r\n");
        // With keys on the server, add: "Authorization: Api-Key KEY\r\n".
        std::string head;
        while (head.find("\r\n\r\n") == std::string::npos) head += read(1);
        if (head.find(" 101 ") == std::string::npos) throw std::runtime_error(head);
    }
    ~Socket() { close(fd); }
    void write(const std::string& s) {
        for (std::size_t at = 0; at < s.size();) {
            // A server that is gone is an error here, not the end of the process by SIGPIPE.
            auto n = ::send(fd, s.data() + at, s.size() - at, MSG_NOSIGNAL);
            if (n <= 0) throw std::runtime_error("the connection broke");
            at += n;
        }
    }
    std::string read(std::size_t count) {
        std::string s(count, 0);
        for (std::size_t at = 0; at < count;) {
            auto n = ::read(fd, &s[at], count - at);
            if (n <= 0) throw std::runtime_error("the connection broke");
            at += n;
        }
        return s;
    }
    void send(int opcode, const std::string& payload) {
        Packer head;
        auto n = payload.size();
        int extended = n < 126 ? 0 : n < 65536 ? 2 : 8;  // no other form is allowed
        head.byte(0x80 | opcode);
        head.byte(0x80 | (extended == 0 ? static_cast<int>(n) : extended == 2 ? 126 : 127));
        head.big_endian(n, extended);
        head.big_endian(0, 4);  // a mask of zeros leaves the payload as it is
        write(head.out + payload);
    }
    std::string receive() {
        for (;;) {
            auto head = read(2);
            int opcode = head[0] & 0x0f;
            std::uint64_t n = head[1] & 0x7f;
            if (n >= 126) {
                std::uint64_t longer = 0;
                for (unsigned char c : read(n == 126 ? 2 : 8)) longer = longer << 8 | c;
                n = longer;
            }
            auto payload = read(n);
            if (opcode == 2) return payload;
            if (opcode == 1) throw std::runtime_error(payload);  // an error; its last line says it
            if (opcode == 8) throw std::runtime_error("the server closed the connection");
            if (opcode == 9) send(10, payload);
        }
    }
};

// `actions` comes first in an answer: its data is the first value under that tag.
std::vector<double> actions(const std::string& answer) {
    auto at = answer.find(std::string("\xc4\x04" "data", 6));
    if (at == std::string::npos) throw std::runtime_error("no actions");
    at += 6;
    int width = 1 << ((answer.at(at) & 0xff) - 0xc4);
    std::size_t n = 0;
    for (int i = 1; i <= width; i++) n = n << 8 | (answer.at(at + i) & 0xff);
    std::vector<double> values(n / 8);
    std::memcpy(values.data(), answer.substr(at + 1 + width, n).data(), n);
    return values;
}

int main(int argc, char** argv) {
    Socket socket(argc > 1 ? argv[1] : "localhost", argc > 2 ? argv[2] : "8000");
    socket.receive();  // the server's metadata

    Packer request;
@OBSERVATION@
    socket.send(2, request.out);
    auto chunk = actions(socket.receive());
    const std::size_t dims = @DIMS@;  // @MEANING@
    for (std::size_t i = 0; i < chunk.size(); i++)
        std::printf("%9.4f%c", chunk[i], (i + 1) % dims ? ' ' : '\n');
}
