/* Preloaded into a process under test: counts what it does to files under one folder, and lets one of these operations fail.
 *
 * arm(folder, kind, at) starts counting at 0. At operation number `at` (from 1; 0: never):
 *   kill    the process dies before the operation, as by SIGKILL
 *   after   the process dies after the operation
 *   enospc  the operation, and every later one that takes space, fails: the disk is full
 *   eio     the operation fails once
 *   short   a write writes half of its bytes; other operations are left alone
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, AFTER, ENOSPC_, EIO_, SHORT };
static char root[4096];
static int kind = NONE;
static long at = 0, count = 0;

void arm(const char *folder, const char *name, long number) {
    static const char *names[] = {"none", "kill", "after", "enospc", "eio", "short"};
    snprintf(root, sizeof root, "%s", folder);
    at = number;
    count = 0;
    for (int i = 0; i < 6; i++)
        if (!strcmp(name, names[i])) kind = i;
}

long counted(void) { return count; }

static int inside(const char *path) { return root[0] && path && !strncmp(path, root, strlen(root)); }

static int inside_fd(int fd) {
    char link[64], path[4096];
    if (!root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return inside(path);
}

/* Returns whether this operation fails, with errno set. */
static int fails(int counts, int takes_space) {
    if (!counts) return 0;
    long now = __sync_add_and_fetch(&count, 1);
    if (!at || now < at) return 0;
    if (kind == KILL && now == at) raise(SIGKILL);
    if (kind == ENOSPC_ && takes_space) { errno = ENOSPC; return 1; }
    if (kind == EIO_ && now == at) { errno = EIO; return 1; }
    return 0;
}

static void done(int counts) {
    if (counts && kind == AFTER && at && count >= at) raise(SIGKILL);
}

static size_t cut(int counts, size_t length) {
    return counts && kind == SHORT && at && count == at && length > 1 ? length / 2 : length;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t length) {
    REAL(write);
    int counts = inside_fd(fd);
    if (fails(counts, 1)) return -1;
    ssize_t written = real(fd, data, cut(counts, length));
    done(counts);
    return written;
}

#define PWRITE(name, offset_type)                                              \
    ssize_t name(int fd, const void *data, size_t length, offset_type place) { \
        REAL(name);                                                            \
        int counts = inside_fd(fd);                                            \
        if (fails(counts, 1)) return -1;                                       \
        ssize_t written = real(fd, data, cut(counts, length), place);          \
        done(counts);                                                          \
        return written;                                                        \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL(writev);
    int counts = inside_fd(fd);
    if (fails(counts, 1)) return -1;
    ssize_t written = real(fd, parts, number);
    done(counts);
    return written;
}

#define OF_FD(name, takes_space)                  \
    int name(int fd) {                            \
        REAL(name);                               \
        int counts = inside_fd(fd);               \
        if (fails(counts, takes_space)) return -1; \
        int result = real(fd);                    \
        done(counts);                             \
        return result;                            \
    }
OF_FD(fsync, 0)
OF_FD(fdatasync, 0)

#define RESIZE(name, type)                        \
    int name(int fd, type length) {               \
        REAL(name);                               \
        int counts = inside_fd(fd);               \
        if (fails(counts, 1)) return -1;          \
        int result = real(fd, length);            \
        done(counts);                             \
        return result;                            \
    }
RESIZE(ftruncate, off_t)
RESIZE(ftruncate64, off64_t)

#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        REAL(name);                                                       \
        va_list rest;                                                     \
        va_start(rest, flags);                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                     \
        int counts = flags & O_CREAT && inside(path);                     \
        if (fails(counts, 1)) return -1;                                  \
        int fd = real(path, flags, mode);                                 \
        done(counts);                                                     \
        return fd;                                                        \
    }
OPEN(open)
OPEN(open64)

#define PATHS(name, takes_space)                       \
    int name(const char *from, const char *to) {       \
        REAL(name);                                    \
        int counts = inside(to);                       \
        if (fails(counts, takes_space)) return -1;     \
        int result = real(from, to);                   \
        done(counts);                                  \
        return result;                                 \
    }
PATHS(rename, 0)
PATHS(link, 1)

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags) {
    REAL(renameat2);
    int counts = inside(to);
    if (fails(counts, 0)) return -1;
    int result = real(from_fd, from, to_fd, to, flags);
    done(counts);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    int counts = inside(path);
    if (fails(counts, 1)) return -1;
    int result = real(path, mode);
    done(counts);
    return result;
}
