/*
 * A plugin without a disk, for `make bench`: sends files of given kinds, sizes and names from memory, so that what is
 * left is the daemon's own work. Never part of what is installed.
 *
 *   Plugin = "ceiling: RECORD LIST"
 *
 * LIST names a file with one line an object, "KIND SIZE NAME": f file, d directory (behind its content), l link. Each
 * object gets an extended attribute stream of RECORD bytes; 0: none.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bacula_fd_abi.h"

struct object {
    char kind;
    int64_t size;
    char *name;
};

struct job {
    struct object *objects;
    size_t count, next;
    int64_t left;
    int record, record_due;
};

static char noise[1 << 16], record[4096];

static int load_list(struct job *job, const char *command)
{
    char path[4096], *line = NULL;
    size_t room = 0, capacity = 0;
    FILE *list;

    if (sscanf(command, "ceiling: %d %4095s", &job->record, path) != 2 || job->record > (int)sizeof record)
        return bRC_Error;
    if (!(list = fopen(path, "r"))) return bRC_Error;
    while (getline(&line, &room, list) > 0) {
        struct object *object;
        int at = 0;
        if (job->count == capacity) {
            capacity = capacity ? 2 * capacity : 1024;
            job->objects = realloc(job->objects, capacity * sizeof *job->objects);
            if (!job->objects) abort();
        }
        object = &job->objects[job->count];
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "%c %ld %n", &object->kind, &object->size, &at) < 2 || !at) continue;
        object->name = strdup(line + at);
        job->count++;
    }
    free(line);
    fclose(list);
    return bRC_OK;
}

static int new_plugin(struct bpContext *context)
{
    context->pContext = calloc(1, sizeof(struct job));
    return context->pContext ? bRC_OK : bRC_Error;
}

static int free_plugin(struct bpContext *context)
{
    struct job *job = context->pContext;
    for (size_t n = 0; n < job->count; n++) free(job->objects[n].name);
    free(job->objects);
    free(job);
    context->pContext = NULL;
    return bRC_OK;
}

static int value(struct bpContext *context, int variable, void *to)
{
    (void)context; (void)variable; (void)to;
    return bRC_OK;
}

static int event(struct bpContext *context, struct bEvent *event, void *to)
{
    /* Before the job's clock starts. */
    if (event->eventType == bEventPluginCommand) return load_list(context->pContext, to);
    return bRC_OK;
}

static int start_backup_file(struct bpContext *context, struct save_pkt *packet)
{
    struct job *job = context->pContext;
    const struct object *object = &job->objects[job->next];

    if (job->next == job->count) return bRC_Max;
    packet->fname = object->name;
    packet->link = object->kind == 'f' ? NULL : object->name;
    packet->type = object->kind == 'd' ? FT_DIREND : object->kind == 'l' ? FT_LNK : object->size ? FT_REG : FT_REGE;
    packet->no_read = packet->type != FT_REG;
    memset(&packet->statp, 0, sizeof packet->statp);
    packet->statp.st_mode = object->kind == 'd' ? S_IFDIR | 0755 : object->kind == 'l' ? S_IFLNK | 0777 : S_IFREG | 0644;
    packet->statp.st_nlink = 1;
    packet->statp.st_ino = job->next + 1;
    packet->statp.st_size = object->size;
    packet->statp.st_mtime = packet->statp.st_ctime = packet->statp.st_atime = 1700000000;
    job->left = object->kind == 'f' ? object->size : 0;
    job->record_due = job->record > 0;
    return bRC_OK;
}

static int end_backup_file(struct bpContext *context)
{
    struct job *job = context->pContext;
    job->next++;
    return bRC_More;
}

static int io(struct bpContext *context, struct io_pkt *packet)
{
    struct job *job = context->pContext;
    packet->status = 0;
    packet->io_errno = 0;
    if (packet->func == IO_READ) {
        int64_t count = packet->count;
        if (count > job->left) count = job->left;
        if (count > (int64_t)sizeof noise) count = sizeof noise;
        memcpy(packet->buf, noise, count);
        job->left -= count;
        packet->status = count;
    }
    return bRC_OK;
}

static int xacl(struct bpContext *context, struct xacl_pkt *packet)
{
    struct job *job = context->pContext;
    packet->count = 0;
    if (packet->func == BXATTR_BACKUP && job->record_due) {
        job->record_due = 0;
        packet->content = record;
        packet->count = job->record;
    }
    return bRC_OK;
}

static int no_restore(struct bpContext *context, const char *command) { (void)context; (void)command; return bRC_Error; }
static int no_end(struct bpContext *context) { (void)context; return bRC_Error; }
static int no_packet(struct bpContext *context, struct restore_pkt *packet) { (void)context; (void)packet; return bRC_Error; }
static int check_file(struct bpContext *context, char *name) { (void)context; (void)name; return bRC_OK; }

static struct pFuncs functions = {
    .size = sizeof functions,
    .version = 1,
    .newPlugin = new_plugin,
    .freePlugin = free_plugin,
    .getPluginValue = value,
    .setPluginValue = value,
    .handlePluginEvent = event,
    .startBackupFile = start_backup_file,
    .endBackupFile = end_backup_file,
    .startRestoreFile = no_restore,
    .endRestoreFile = no_end,
    .pluginIO = io,
    .createFile = no_packet,
    .setFileAttributes = no_packet,
    .checkFile = check_file,
    .handleXACLdata = xacl,
};

static struct pInfo info = {
    .size = sizeof info,
    .plugin_magic = "*FDPluginData*",
    .plugin_license = "AGPLv3",
    .plugin_author = "guestsnap",
    .plugin_date = "2026",
    .plugin_version = "0",
    .plugin_description = "files from memory",
};

int loadPlugin(struct bInfo *theirs, struct bFuncs *core, struct pInfo **out_info, struct pFuncs **out_functions)
{
    uint64_t state = 88172645463325252ULL;
    for (size_t n = 0; n < sizeof noise; n += 8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        memcpy(noise + n, &state, 8);
    }
    memcpy(record, noise, sizeof record);
    info.version = theirs->version;
    *out_info = &info;
    *out_functions = &functions;
    (void)core;
    return bRC_OK;
}

int unloadPlugin(void) { return bRC_OK; }
