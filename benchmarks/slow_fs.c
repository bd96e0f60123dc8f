/* A file system that shows another folder read-only, and answers every request late.

   It stands for a busy network file system: each request of the kernel (look-up, open, read, page
   of a listing) waits first, many can wait at once, and the kernel keeps names, attributes and
   content as it does for NFS. Files named ".*" can be written, so that a cache can be kept there.

       slow_fs FOLDER MILLISECONDS MOUNT_POINT

   It stays in the foreground; `umount MOUNT_POINT` ends it. benchmarks/start_up.py builds and
   starts it. It needs libfuse 3 and the right to mount. */

#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <limits.h>
#include <linux/fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static const char *folder;
static struct timespec latency;
static _Atomic long requests; /* printed at the end */

static void wait_first(void) {
    requests++;
    if (latency.tv_sec || latency.tv_nsec)
        nanosleep(&latency, NULL);
}

#define REAL(name, path) \
    char name[PATH_MAX]; \
    snprintf(name, sizeof name, "%s%s", folder, path)

#define ANSWER(call) return (call) < 0 ? -errno : 0

static int slow_getattr(const char *path, struct stat *status, struct fuse_file_info *info) {
    (void)info;
    REAL(real, path);
    wait_first();
    ANSWER(lstat(real, status));
}

static int slow_readlink(const char *path, char *target, size_t size) {
    REAL(real, path);
    wait_first();
    ssize_t length = readlink(real, target, size - 1);
    if (length < 0)
        return -errno;
    target[length] = 0;
    return 0;
}

static int slow_open(const char *path, struct fuse_file_info *info) {
    REAL(real, path);
    wait_first();
    int file = open(real, info->flags);
    if (file < 0)
        return -errno;
    info->fh = file;
    return 0;
}

static int slow_create(const char *path, mode_t mode, struct fuse_file_info *info) {
    REAL(real, path);
    wait_first();
    int file = open(real, info->flags, mode);
    if (file < 0)
        return -errno;
    info->fh = file;
    return 0;
}

static int slow_read(const char *path, char *out, size_t size, off_t at, struct fuse_file_info *i) {
    (void)path;
    wait_first();
    ssize_t count = pread(i->fh, out, size, at);
    return count < 0 ? -errno : count;
}

static int slow_write(const char *path, const char *in, size_t size, off_t at,
                      struct fuse_file_info *info) {
    (void)path;
    wait_first();
    ssize_t count = pwrite(info->fh, in, size, at);
    return count < 0 ? -errno : count;
}

static int slow_fsync(const char *path, int data, struct fuse_file_info *info) {
    (void)path, (void)data;
    wait_first();
    ANSWER(fsync(info->fh));
}

static int slow_release(const char *path, struct fuse_file_info *info) {
    (void)path;
    close(info->fh);
    return 0;
}

static int slow_readdir(const char *path, void *buffer, fuse_fill_dir_t fill, off_t at,
                        struct fuse_file_info *info, enum fuse_readdir_flags flags) {
    (void)info, (void)flags;
    REAL(real, path);
    wait_first();
    DIR *listing = opendir(real);
    if (!listing)
        return -errno;
    if (at)
        seekdir(listing, at);
    struct dirent *entry;
    while ((entry = readdir(listing))) {
        struct stat kind = {.st_ino = entry->d_ino, .st_mode = DTTOIF(entry->d_type)};
        if (fill(buffer, entry->d_name, &kind, telldir(listing), 0))
            break; /* this page is full */
    }
    closedir(listing);
    return 0;
}

static int slow_unlink(const char *path) {
    REAL(real, path);
    wait_first();
    ANSWER(unlink(real));
}

static int slow_chmod(const char *path, mode_t mode, struct fuse_file_info *info) {
    (void)info;
    REAL(real, path);
    wait_first();
    ANSWER(chmod(real, mode));
}

static int slow_truncate(const char *path, off_t size, struct fuse_file_info *info) {
    (void)info;
    REAL(real, path);
    wait_first();
    ANSWER(truncate(real, size));
}

static int slow_rename(const char *from, const char *to, unsigned flags) {
    (void)flags;
    REAL(real_from, from);
    REAL(real_to, to);
    wait_first();
    ANSWER(rename(real_from, real_to));
}

static void *slow_init(struct fuse_conn_info *connection, struct fuse_config *config) {
    connection->max_background = 256; /* read-ahead of many readers at once */
    connection->congestion_threshold = 256;
    config->auto_cache = 1;       /* content stays while size and time stay, as with NFS */
    config->entry_timeout = 3;    /* seconds: what NFS keeps attributes of files for at least */
    config->attr_timeout = 3;
    config->ac_attr_timeout_set = 1;
    config->ac_attr_timeout = 0;  /* each open asks for the attributes, as with NFS */
    return NULL;
}

static const struct fuse_operations operations = {
    .init = slow_init, .getattr = slow_getattr, .readlink = slow_readlink, .open = slow_open,
    .create = slow_create, .read = slow_read, .write = slow_write, .fsync = slow_fsync,
    .release = slow_release, .readdir = slow_readdir, .unlink = slow_unlink,
    .chmod = slow_chmod, .truncate = slow_truncate, .rename = slow_rename,
};

/* libfuse before 3.17 does not tell the kernel that look-ups in one folder may run side by side, and
   the kernel then sends one at a time. So the answer to its first request is completed here, on its
   way from libfuse to the kernel: this function takes the place of the C library's in libfuse. */
ssize_t writev(int file, const struct iovec *parts, int count) {
    static _Atomic int is_later;
    if (count == 2 && parts[1].iov_len >= 24 && !is_later) {
        is_later = 1;
        ((struct fuse_init_out *)parts[1].iov_base)->flags |= FUSE_PARALLEL_DIROPS;
    }
    return syscall(SYS_writev, file, parts, count);
}

int main(int count, char **words) {
    if (count != 4) {
        fprintf(stderr, "use: %s FOLDER MILLISECONDS MOUNT_POINT\n", words[0]);
        return 2;
    }
    folder = realpath(words[1], NULL);
    if (!folder) {
        perror(words[1]);
        return 2;
    }
    double seconds = atof(words[2]) / 1000;
    latency.tv_sec = seconds;
    latency.tv_nsec = (seconds - latency.tv_sec) * 1e9;
    char *own[] = {words[0], "-f", "-o", "max_threads=128,max_idle_threads=128", words[3], NULL};
    int result = fuse_main(5, own, &operations, NULL);
    printf("%ld\n", (long)requests);
    return result;
}
