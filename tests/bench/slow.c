/*
 * A filesystem with one file, "disk", that is another file with a slow disk's reads: each takes some milliseconds, any
 * number of them at once. Writes take no time. For machines without dm-delay.
 *
 *   slow MILLISECONDS FILE MOUNTPOINT
 */
#define FUSE_USE_VERSION 312
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static int disk;
static struct timespec delay;

static void *slow_init(struct fuse_conn_info *conn, struct fuse_config *config)
{
    (void)config;
    conn->max_background = 512;
    conn->congestion_threshold = 512;
    return NULL;
}

static int slow_getattr(const char *path, struct stat *st, struct fuse_file_info *info)
{
    (void)info;
    if (strcmp(path, "/disk") == 0)
        return fstat(disk, st) ? -errno : 0;
    if (strcmp(path, "/") != 0)
        return -ENOENT;
    st->st_mode = S_IFDIR | 0700;
    st->st_nlink = 2;
    return 0;
}

static int slow_open(const char *path, struct fuse_file_info *info)
{
    if (strcmp(path, "/disk") != 0)
        return -ENOENT;
    info->direct_io = 1;
    return 0;
}

static int slow_read(const char *path, char *buffer, size_t length, off_t offset, struct fuse_file_info *info)
{
    (void)path;
    (void)info;
    nanosleep(&delay, NULL);
    ssize_t got = pread(disk, buffer, length, offset);
    return got < 0 ? -errno : (int)got;
}

static int slow_write(const char *path, const char *buffer, size_t length, off_t offset, struct fuse_file_info *info)
{
    (void)path;
    (void)info;
    ssize_t put = pwrite(disk, buffer, length, offset);
    return put < 0 ? -errno : (int)put;
}

static int slow_fsync(const char *path, int data_only, struct fuse_file_info *info)
{
    (void)path;
    (void)info;
    return (data_only ? fdatasync(disk) : fsync(disk)) ? -errno : 0;
}

static const struct fuse_operations operations = {
    .init = slow_init,
    .getattr = slow_getattr,
    .open = slow_open,
    .read = slow_read,
    .write = slow_write,
    .fsync = slow_fsync,
};

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: slow MILLISECONDS FILE MOUNTPOINT\n");
        return 2;
    }
    long milliseconds = atol(argv[1]);
    delay.tv_sec = milliseconds / 1000;
    delay.tv_nsec = milliseconds % 1000 * 1000000;
    disk = open(argv[2], O_RDWR | O_CLOEXEC);
    if (disk < 0) {
        perror(argv[2]);
        return 1;
    }
    char *arguments[] = {argv[0], "-o", "max_threads=256,max_idle_threads=256", argv[3], NULL};
    return fuse_main(4, arguments, &operations, NULL);
}
