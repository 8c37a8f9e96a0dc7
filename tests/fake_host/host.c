/*
 * A File Daemon without Bacula: loads the plugin and drives its function table the way the daemon
 * of the compiled-in interface version does (-DGUESTSNAP_ABI=n), in one process and one run:
 *
 *   host PLUGIN.so WORKDIR COMMAND [ARG...]
 *
 *   load                           load and unload only
 *   backup DIRECTIVE [WHERE]       a full backup; with WHERE, then a restore of it below WHERE
 *   incremental DIRECTIVE          checkChanges says "unchanged" to all but names in CHANGED=
 *   estimate DIRECTIVE             what an estimate asks
 *   cancel DIRECTIVE N             cancels from another thread after N files
 *   console                        a connection that is no job
 *
 * Prints one line per callback of interest. Exit status 0 unless the plugin could not be used;
 * what the job log would hold is in the MSG lines. Environment: EXCLUDE=substring of names that
 * AcceptFile refuses, VERSION=n overrides the number reported to the plugin.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bacula_fd_abi.h"

struct saved {
    int type;
    char *name, *link;
    struct stat st;
    int linkfi, index;
    char *data;
    size_t len;
    char *xattr;
    int xlen;
    struct saved *next;
};

static struct saved *volume, **volume_end = &volume;
static struct pFuncs *plugin;
static const char *workdir;
static int file_index, level = 'F', fatal, cancelled, accepted;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static const char *kind(int type)
{
    return type == M_FATAL ? "FATAL" : type == M_ERROR ? "ERROR" : type == M_WARNING ? "WARNING"
         : type == M_INFO  ? "INFO"  : "OTHER";
}

static int register_events(struct bpContext *ctx, ...) { (void)ctx; return bRC_OK; }

static int get_value(struct bpContext *ctx, int var, void *value)
{
    if (!ctx) {
        /* As the daemon does: the value is written all the same. */
        if (var == bVarWorkingDir) *(const char **)value = workdir;
        return bRC_Error;
    }
    int *number = value;
    if (var == bVarJobId) *number = 7;
    else if (var == bVarLevel) *number = level;
    else if (var == bVarType) *number = 'B';
    else if (var == bVarJobStatus) *number = cancelled ? 'A' : fatal ? 'f' : 'R';
    else if (var == bVarAccurate) *number = 0;
    else if (var == bVarFileIndex) *number = file_index;
    else if (bVarIsCanceled && var == bVarIsCanceled) *number = cancelled;
    else if (var == bVarWorkingDir) *(const char **)value = workdir;
    /* An incremental job adds to the one that ran before. */
    else if (var == bVarJobName || var == bVarPrevJobName) *(const char **)value = "fake.job";
    else return bRC_Error;
    return bRC_OK;
}

static int set_value(struct bpContext *ctx, int var, void *value)
{
    (void)ctx;
    if (var == bVarFileSeen) printf("SEEN %s\n", (char *)value);
    return bRC_OK;
}

static int job_message(struct bpContext *ctx, const char *file, int line, int type, int64_t mtime, const char *fmt, ...)
{
    char text[2000];
    va_list args;
    (void)file; (void)line; (void)mtime;
    va_start(args, fmt);
    vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    pthread_mutex_lock(&lock);
    printf("%s %s %s", ctx ? "MSG" : "DAEMON", kind(type), text);
    if (ctx && type == M_FATAL) fatal = 1;
    pthread_mutex_unlock(&lock);
    return bRC_OK;
}

static int debug_message(struct bpContext *ctx, const char *file, int line, int lvl, const char *fmt, ...)
{
    va_list args;
    (void)ctx; (void)file; (void)line; (void)lvl;
    if (!getenv("DEBUG")) return bRC_OK;
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    return bRC_OK;
}

static int check_changes(struct bpContext *ctx, struct save_pkt *sp)
{
    const char *changed = getenv("CHANGED");
    (void)ctx;
    if (level == 'F') return bRC_OK;
    return changed && strstr(sp->fname, changed) ? bRC_OK : bRC_Seen;
}

/* Marks a packet that was asked about: the mark stays unless the plugin fills it again. */
#define ASKED (-42)

static int accept_file(struct bpContext *ctx, struct save_pkt *sp)
{
    const char *exclude = getenv("EXCLUDE");
    (void)ctx;
    accepted++;
    sp->statp.st_blksize = ASKED;
    return exclude && strstr(sp->fname, exclude) ? bRC_Skip : bRC_OK;
}

static int unused(void) { return bRC_OK; }

static struct bFuncs functions = {
    .size = sizeof functions, .version = GUESTSNAP_ABI,
    .registerBaculaEvents = register_events,
    .getBaculaValue = get_value, .setBaculaValue = set_value,
    .JobMessage = job_message, .DebugMessage = debug_message,
    .AddExclude = (void *)unused, .AddInclude = (void *)unused, .AddOptions = (void *)unused,
    .AddRegex = (void *)unused, .AddWild = (void *)unused, .NewOptions = (void *)unused,
    .NewInclude = (void *)unused, .NewPreInclude = (void *)unused,
    .checkChanges = check_changes, .AcceptFile = accept_file,
};

static int event(struct bpContext *ctx, int type, void *value)
{
    struct bEvent e = { .eventType = type };
    return plugin->handlePluginEvent(ctx, &e, value);
}

static int io(struct bpContext *ctx, int func, char *buf, int count, long long offset, int *error)
{
    struct io_pkt p = { .pkt_size = sizeof p, .pkt_end = sizeof p, .func = func, .buf = buf, .count = count,
                        .offset = offset };
    plugin->pluginIO(ctx, &p);
    *error = p.io_errno;
    return p.status;
}

static void save_data(struct bpContext *ctx, struct saved *s)
{
    static char buf[65536];
    int error, n;
    if (io(ctx, IO_OPEN, NULL, 0, 0, &error) < 0) { printf("CANNOT OPEN %s: %s\n", s->name, strerror(error)); return; }
    while ((n = io(ctx, IO_READ, buf, sizeof buf, 0, &error)) > 0) {
        s->data = realloc(s->data, s->len + n);
        memcpy(s->data + s->len, buf, n);
        s->len += n;
    }
    if (n < 0) printf("READ ERROR %s: %s\n", s->name, strerror(error));
    io(ctx, IO_CLOSE, NULL, 0, 0, &error);
}

static void save_xacl(struct bpContext *ctx, struct saved *s, int func)
{
    for (int calls = 0;; calls++) {
        struct xacl_pkt x = { .pkt_size = sizeof x, .pkt_end = sizeof x, .func = func };
        plugin->handleXACLdata(ctx, &x);
        if (x.count <= 0) return;
        if (calls > 3) { printf("ENDLESS XACL\n"); exit(3); }
        s->xattr = memcpy(malloc(x.count), x.content, x.count);
        s->xlen = x.count;
    }
}

static void *cancel_thread(void *ctx)
{
    event(ctx, bEventCancelCommand, NULL);
    cancelled = 1;
    return NULL;
}

static void backup_files(struct bpContext *ctx, const char *cmd, int estimate, int cancel_after)
{
    int filled_again = 0;
    for (int files = 0;; files++) {
        struct save_pkt sp;
        memset(&sp, 0, sizeof sp);
        sp.pkt_size = sp.pkt_end = sizeof sp;
        sp.portable = true;
        sp.cmd = (char *)cmd;
        if (fatal || cancelled) break;
        if (cancel_after >= 0 && files == cancel_after) {
            pthread_t t;
            pthread_create(&t, NULL, cancel_thread, ctx);
            pthread_join(t, NULL);
        }
        accepted = 0;
        int rc = plugin->startBackupFile(ctx, &sp);
        if (rc != bRC_OK) break;
        if (sp.type == FT_PLUGIN_CONFIG) {
#if GUESTSNAP_ABI >= 22
            struct restore_object *o = &sp.restore_obj;
#else
            struct save_pkt *o = &sp;
#endif
            if (o->object_len != (int)strlen(o->object) || estimate) { printf("BAD OBJECT\n"); exit(3); }
            file_index++;
            printf("OBJECT %s length=%d asks=%s\n", o->object_name, o->object_len, strstr(o->object, "strip=@BOOL@") ? "strip" : "nothing");
            if (plugin->endBackupFile(ctx) != bRC_More) break;
            continue;
        }
        if (!sp.fname || !sp.type) { printf("NO NAME OR TYPE\n"); exit(3); }
        if (!accepted) { printf("NOT ASKED ABOUT %s\n", sp.fname); exit(3); }
        struct saved *s = calloc(1, sizeof *s);
        s->type = sp.type;
        s->name = strdup(sp.fname);
        s->link = sp.link ? strdup(sp.link) : NULL;
        s->st = sp.statp;
        if (sp.statp.st_blksize != ASKED) filled_again++;
        s->linkfi = sp.LinkFI;
        if (sp.type == FT_DIREND && (!sp.link || sp.link[strlen(sp.link) - 1] != '/')) { printf("BAD DIRECTORY\n"); exit(3); }
        if (!estimate) {
            s->index = ++file_index;
            if (!sp.no_read) save_data(ctx, s);
            save_xacl(ctx, s, BACL_BACKUP);
            save_xacl(ctx, s, BXATTR_BACKUP);
        }
        printf("FILE type=%d index=%d linkfi=%d size=%lld data=%zu xattr=%d %s%s%s\n", s->type, s->index, s->linkfi,
               (long long)s->st.st_size, s->len, s->xlen, s->name, s->type != FT_DIREND && s->link ? " -> " : "",
               s->type != FT_DIREND && s->link ? s->link : "");
        *volume_end = s;
        volume_end = &s->next;
        rc = plugin->endBackupFile(ctx);
        if (rc != bRC_More) break;
    }
    printf("FILLED AGAIN %d\n", filled_again);
}

static void backup(struct bpContext *ctx, const char *directive, int estimate, int cancel_after)
{
    char *cmd = strdup(directive);
    event(ctx, bEventJobStart, "JobId=7 Job=fake");
    event(ctx, bEventLevel, (void *)(long)level);
    event(ctx, bEventPluginCommand, cmd);
    if (!fatal) event(ctx, bEventEndFileSet, NULL);
    if (!fatal && !estimate) event(ctx, bEventStartBackupJob, NULL);
    if (!fatal && event(ctx, estimate ? bEventEstimateCommand : bEventBackupCommand, cmd) == bRC_OK)
        backup_files(ctx, cmd, estimate, cancel_after);
    if (!estimate) event(ctx, bEventEndBackupJob, NULL);
    if (!fatal && !cancelled) event(ctx, bEventJobEnd, NULL);
    printf("JOB %s\n", fatal ? "fatal" : cancelled ? "cancelled" : "done");
}

static char *joined(const char *where, const char *name)
{
    char *out;
    if (asprintf(&out, "%s%s%s", where, name[0] == '/' ? "" : "/", name) < 0) abort();
    return out;
}

static void restore_one(struct bpContext *ctx, const char *cmd, const char *where, struct saved *s)
{
    struct restore_pkt rp;
    int error = 0, chunk;
    memset(&rp, 0, sizeof rp);
    rp.pkt_size = rp.pkt_end = sizeof rp;
    rp.stream = 1;
    rp.data_stream = 2;
    rp.type = s->type;
    rp.file_index = s->index;
    rp.LinkFI = s->linkfi;
    rp.statp = s->st;
    rp.ofname = joined(where, s->name);
    rp.olname = s->type == FT_LNKSAVED ? joined(where, s->link) : s->link ? s->link : "";
    rp.where = where;
    rp.replace = 'a';
    rp.create_status = CF_ERROR;
    event(ctx, bEventRestoreCommand, (void *)cmd);
    plugin->startRestoreFile(ctx, cmd);
    int rc = plugin->createFile(ctx, &rp);
    printf("RESTORE %s rc=%d status=%d\n", rp.ofname, rc, rp.create_status);
    int extracted = rp.create_status == CF_EXTRACT;
    if (extracted && io(ctx, IO_OPEN, NULL, 0, 0, &error) < 0) { printf("CANNOT CREATE\n"); return; }
    for (size_t done = 0; extracted && done < s->len; done += chunk) {
        chunk = s->len - done > 65536 ? 65536 : (int)(s->len - done);
        if (io(ctx, IO_WRITE, s->data + done, chunk, 0, &error) != chunk) { printf("WRITE ERROR %s\n", strerror(error)); return; }
    }
    rp.create_status = CF_ERROR;
    if (extracted || s->type == FT_DIREND || s->type == FT_LNK || s->type == FT_SPEC) plugin->setFileAttributes(ctx, &rp);
    if (extracted) io(ctx, IO_CLOSE, NULL, 0, 0, &error);
    if (s->xlen && (extracted || s->type == FT_DIREND || s->type == FT_LNK)) {
        struct xacl_pkt x = { .pkt_size = sizeof x, .pkt_end = sizeof x, .func = BXATTR_RESTORE, .count = s->xlen,
                              .content = s->xattr };
        plugin->handleXACLdata(ctx, &x);
    }
    plugin->endRestoreFile(ctx);
}

/* The Director's answer to the questions; `\n` stands for the end of a line. */
static void answer(struct bpContext *ctx, const char *cmd, const char *text)
{
    char *object = strdup(text), *end;
    while ((end = strstr(object, "\\n"))) { *end = '\n'; memmove(end + 1, end + 2, strlen(end + 2) + 1); }
    struct restore_object_pkt o = { .pkt_size = sizeof o, .pkt_end = sizeof o, .object_name = "options", .object = object,
        .plugin_name = (char *)cmd, .object_type = FT_PLUGIN_CONFIG_FILLED, .object_len = (int)strlen(object),
        .object_full_len = (int)strlen(object), .JobId = 8 };
    event(ctx, bEventRestoreObject, &o);
    event(ctx, bEventRestoreObject, NULL);
}

#if GUESTSNAP_ABI >= 21
static void query(struct bpContext *ctx, const char *line, const char *parameter)
{
    for (int rc = bRC_More, asked = 0; rc == bRC_More; asked++) {
        struct query_pkt q = { .pkt_size = sizeof q, .pkt_end = sizeof q, .parameter = (char *)parameter, .command = (char *)line };
        rc = plugin->queryParameter(ctx, &q);
        printf("ANSWER rc=%d %s", rc, q.result ? q.result : "nothing\n");
        if (asked > 20) { printf("ENDLESS QUERY\n"); exit(3); }
    }
}
#endif

static int threads(void)
{
    int n = 0;
    DIR *dir = opendir("/proc/self/task");
    for (struct dirent *e; (e = readdir(dir));) n += e->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void open_fds(const char *when)
{
    int n = 0;
    for (int fd = 0; fd < 1024; fd++) {
        char path[64], target[512];
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        ssize_t len = readlink(path, target, sizeof target - 1);
        if (len < 0) continue;
        n++;
        if (getenv("DEBUG")) { target[len] = 0; fprintf(stderr, "fd %d %s\n", fd, target); }
    }
    printf("FDS %s %d threads %d\n", when, n, threads());
}

int main(int argc, char **argv)
{
    int (*load)(void *, void *, struct pInfo **, struct pFuncs **), (*unload)(void);
    struct bInfo info = { .size = sizeof info, .version = GUESTSNAP_ABI };
    struct pInfo *pinfo = NULL;
    struct bpContext ctx = { 0 }, ctx2 = { 0 };

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 4) { fprintf(stderr, "usage: host PLUGIN.so WORKDIR COMMAND [ARG...]\n"); return 2; }
    if (getenv("VERSION")) info.version = atoi(getenv("VERSION"));
    workdir = argv[2];
    const char *command = argv[3], *directive = argc > 4 ? argv[4] : "";

    void *so = dlopen(argv[1], RTLD_NOW);
    if (!so) { fprintf(stderr, "%s\n", dlerror()); return 2; }
    load = (__typeof__(load))dlsym(so, "loadPlugin");
    unload = (__typeof__(unload))dlsym(so, "unloadPlugin");
    if (!load || !unload) { fprintf(stderr, "missing entry points\n"); return 2; }
    if (load(&info, &functions, &pinfo, &plugin) != bRC_OK) { printf("REFUSED\n"); unload(); return 1; }
    /* The plugin sweeps beside the daemon's start; what it holds meanwhile is not what jobs leave. */
    for (int waited = 0; waited < 300 && threads() > 1; waited++) usleep(100000);
    printf("LOADED size=%u version=%u table=%u %s\n", pinfo->size, pinfo->version, plugin->size, pinfo->plugin_version);
    if (plugin->size != sizeof(struct pFuncs) || pinfo->version != info.version) return 2;

    open_fds("before");
    if (plugin->newPlugin(&ctx) != bRC_OK) return 2;
    if (!strcmp(command, "backup")) backup(&ctx, directive, 0, -1);
    else if (!strcmp(command, "incremental")) { level = 'I'; backup(&ctx, directive, 0, -1); }
    else if (!strcmp(command, "estimate")) backup(&ctx, directive, 1, -1);
    else if (!strcmp(command, "cancel")) backup(&ctx, directive, 0, argc > 5 ? atoi(argv[5]) : 0);
    else if (!strcmp(command, "console")) { event(&ctx, bEventJobStart, "x"); event(&ctx, bEventJobEnd, NULL); }
#if GUESTSNAP_ABI >= 21
    else if (!strcmp(command, "query")) for (int i = 5; i < argc; i++) query(&ctx, directive, argv[i]);
#endif
    plugin->freePlugin(&ctx);
    if (!strcmp(command, "backup") && argc > 5) {
        fatal = 0;
        plugin->newPlugin(&ctx2);
        event(&ctx2, bEventJobStart, "JobId=8 Job=fake");
        if (getenv("ANSWER")) answer(&ctx2, directive, getenv("ANSWER"));
        event(&ctx2, bEventStartRestoreJob, NULL);
        for (struct saved *s = volume; s && !fatal; s = s->next) restore_one(&ctx2, directive, argv[5], s);
        event(&ctx2, bEventEndRestoreJob, NULL);
        event(&ctx2, bEventJobEnd, NULL);
        plugin->freePlugin(&ctx2);
        printf("RESTORED %s\n", fatal ? "fatal" : "done");
    }
    open_fds("after");
    unload();
    dlclose(so);
    /* A second load in the same process must work: the library stays mapped. */
    so = dlopen(argv[1], RTLD_NOW);
    load = (__typeof__(load))dlsym(so, "loadPlugin");
    printf("RELOAD %d\n", load(&info, &functions, &pinfo, &plugin));
    return 0;
}
