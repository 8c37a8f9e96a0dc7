/*
 * The C interface between Bacula's File Daemon and its plugins, for four interface versions.
 *
 * Our own description, from sizes and offsets recorded with each release. Select the version with
 * -DGUESTSNAP_ABI=n:
 *
 *   14  Bacula 9.0 to 9.6
 *   21  Bacula 11.0
 *   22  Bacula 11.3 and 13.0
 *   23  Bacula 15.0
 *
 * FT_*, FO_*, CF_*, IO_* and bRC_* have one numbering in all of them; M_*, bVar*, the layout of
 * the save and restore packets and the order of the plugin's functions do not. bFuncs only grows
 * at its end. src/ffi/abi.rs asserts sizes and offsets of what is generated from this file.
 */
#ifndef GUESTSNAP_BACULA_FD_ABI_H
#define GUESTSNAP_BACULA_FD_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#ifndef GUESTSNAP_ABI
#error "define GUESTSNAP_ABI as 14, 21, 22 or 23"
#endif

/* One per job and plugin: the daemon's and the plugin's private data. */
struct bpContext {
    void *bContext;
    void *pContext;
};

struct bInfo {
    uint32_t size;
    uint32_t version;
};

struct pInfo {
    uint32_t size;
    uint32_t version;
    const char *plugin_magic;
    const char *plugin_license;
    const char *plugin_author;
    const char *plugin_date;
    const char *plugin_version;
    const char *plugin_description;
};

struct bEvent {
    uint32_t eventType;
};

/* A file as the plugin describes it to the daemon (startBackupFile). */
#if GUESTSNAP_ABI >= 22
struct restore_object {
    char *object_name;
    char *object;
    int32_t object_len;
    int32_t index;
    int32_t object_compression;
};

struct plugin_object {
    char *path;
    char *plugin_name;
    char *object_category;
    char *object_type;
    char *object_name;
    char *object_source;
    char *object_uuid;
    uint64_t object_size;
    int32_t status;
    uint32_t count;
};
#endif

struct save_pkt {
    int32_t pkt_size;
    char *fname;
#if GUESTSNAP_ABI >= 21
    char *snap_fname;
    int32_t plugin_mode;
#endif
    char *link;
    struct stat statp;
    int32_t type;
    uint64_t flags;
    bool no_read;
    bool portable;
    bool accurate_found;
#if GUESTSNAP_ABI >= 21
    bool do_dedup;
#endif
#if GUESTSNAP_ABI >= 23
    bool stat_update;
#endif
    char *cmd;
#if GUESTSNAP_ABI >= 22
    struct restore_object restore_obj;
    struct plugin_object plugin_obj;
    const void *plug_meta;
    uint32_t delta_seq;
#else
    uint32_t delta_seq;
    char *object_name;
    char *object;
    int32_t object_len;
    int32_t index;
#endif
    int32_t LinkFI;
    int32_t pkt_end;
};

/* A file as the daemon describes it to the plugin (createFile, setFileAttributes). */
struct restore_pkt {
    int32_t pkt_size;
#if GUESTSNAP_ABI >= 21
    int32_t plugin_mode;
#endif
    int32_t stream;
    int32_t data_stream;
    int32_t type;
    int32_t file_index;
    int32_t LinkFI;
    uid_t uid;
    struct stat statp;
    const char *attrEx;
    const char *ofname;
    const char *olname;
    const char *where;
    const char *RegexWhere;
    int replace;
    int create_status;
    uint32_t delta_seq;
    int32_t pkt_end;
};

struct io_pkt {
    int32_t pkt_size;
    int32_t func;
    int32_t count;
    int32_t flags;
    mode_t mode;
    char *buf;
    const char *fname;
    int32_t status;
    int32_t io_errno;
    int32_t lerror;
    int32_t whence;
    int64_t offset;
    bool win32;
    int32_t pkt_end;
};

struct xacl_pkt {
    int32_t pkt_size;
    int32_t func;
    int32_t count;
    char *content;
    int32_t pkt_end;
};

struct restore_object_pkt {
    int32_t pkt_size;
    char *object_name;
    char *object;
    char *plugin_name;
    int32_t object_type;
    int32_t object_len;
    int32_t object_full_len;
    int32_t object_index;
    int32_t object_compression;
    int32_t stream;
    uint32_t JobId;
    int32_t pkt_end;
};

#if GUESTSNAP_ABI >= 21
struct query_pkt {
    int32_t pkt_size;
    char *parameter;
    char *command;
    char *api_opts;
    char *result;
    int32_t pkt_end;
};
#endif

/* The daemon's functions. Variadic texts: always "%s" and one pointer. */
struct bFuncs {
    uint32_t size;
    uint32_t version;
    int (*registerBaculaEvents)(struct bpContext *, ...);
    int (*getBaculaValue)(struct bpContext *, int var, void *value);
    int (*setBaculaValue)(struct bpContext *, int var, void *value);
    int (*JobMessage)(struct bpContext *, const char *file, int line, int type, int64_t mtime, const char *fmt, ...);
    int (*DebugMessage)(struct bpContext *, const char *file, int line, int level, const char *fmt, ...);
    void *(*baculaMalloc)(struct bpContext *, const char *file, int line, size_t size);
    void (*baculaFree)(struct bpContext *, const char *file, int line, void *mem);
    int (*AddExclude)(struct bpContext *, const char *file);
    int (*AddInclude)(struct bpContext *, const char *file);
    int (*AddOptions)(struct bpContext *, const char *opts);
    int (*AddRegex)(struct bpContext *, const char *item, int type);
    int (*AddWild)(struct bpContext *, const char *item, int type);
    int (*NewOptions)(struct bpContext *);
    int (*NewInclude)(struct bpContext *);
    int (*NewPreInclude)(struct bpContext *);
    int (*checkChanges)(struct bpContext *, struct save_pkt *);
    int (*AcceptFile)(struct bpContext *, struct save_pkt *);
#if GUESTSNAP_ABI >= 22
    void *getAccurateAttribs;
#endif
#if GUESTSNAP_ABI >= 23
    void *AddPlugin;
    void *AddFileEvent;
#endif
};

/* The plugin's functions, in the order this version calls them by. */
struct pFuncs {
    uint32_t size;
    uint32_t version;
    int (*newPlugin)(struct bpContext *);
    int (*freePlugin)(struct bpContext *);
    int (*getPluginValue)(struct bpContext *, int var, void *value);
    int (*setPluginValue)(struct bpContext *, int var, void *value);
    int (*handlePluginEvent)(struct bpContext *, struct bEvent *, void *value);
    int (*startBackupFile)(struct bpContext *, struct save_pkt *);
    int (*endBackupFile)(struct bpContext *);
    int (*startRestoreFile)(struct bpContext *, const char *cmd);
    int (*endRestoreFile)(struct bpContext *);
    int (*pluginIO)(struct bpContext *, struct io_pkt *);
    int (*createFile)(struct bpContext *, struct restore_pkt *);
    int (*setFileAttributes)(struct bpContext *, struct restore_pkt *);
    int (*checkFile)(struct bpContext *, char *fname);
    int (*handleXACLdata)(struct bpContext *, struct xacl_pkt *);
#if GUESTSNAP_ABI >= 21
    void *restoreFileList;
#endif
    void *checkStream;
#if GUESTSNAP_ABI >= 21
    int (*queryParameter)(struct bpContext *, struct query_pkt *);
#endif
#if GUESTSNAP_ABI >= 22
    /* Not checked for NULL by the daemon. */
    int (*metadataRestore)(struct bpContext *, void *meta);
#endif
#if GUESTSNAP_ABI >= 23
    void *startVerifyFile;
    void *endVerifyFile;
#endif
};

/* Results of the plugin's functions. */
enum {
    bRC_OK = 0,
    bRC_Stop = 1,
    bRC_Error = 2,
    bRC_More = 3,
    bRC_Seen = 5,
    bRC_Skip = 7,
    bRC_Max = 9999,
};

/* Kinds of job messages: renumbered in 13.0. */
enum {
#if GUESTSNAP_ABI >= 22
    M_FATAL = 4,
    M_ERROR = 5,
    M_WARNING = 6,
    M_INFO = 7,
#else
    M_FATAL = 3,
    M_ERROR = 4,
    M_WARNING = 5,
    M_INFO = 6,
#endif
};

/* Variables of a job that we ask for. */
enum {
    bVarJobId = 1,
    bVarFDName = 2,
    bVarLevel = 3,
    bVarType = 4,
    bVarClient = 5,
    bVarJobName = 6,
    bVarJobStatus = 7,
    bVarSinceTime = 8,
    bVarAccurate = 9,
    bVarFileSeen = 10,
    bVarWorkingDir = 13,
#if GUESTSNAP_ABI == 21
    bVarPrevJobName = 19,
    bVarFileIndex = 22,
#else
    bVarPrevJobName = 20,
    bVarFileIndex = 23,
#endif
    /* 0: this version has none. */
#if GUESTSNAP_ABI >= 22
    bVarIsCanceled = 27,
    bVarWhere = 15,
#elif GUESTSNAP_ABI == 21
    bVarIsCanceled = 26,
    bVarWhere = 14,
#else
    bVarIsCanceled = 0,
    bVarWhere = 14,
#endif
};

/* Events we act on; the others are ignored. */
enum {
    bEventJobStart = 1,
    bEventJobEnd = 2,
    bEventStartBackupJob = 3,
    bEventEndBackupJob = 4,
    bEventStartRestoreJob = 5,
    bEventEndRestoreJob = 6,
    bEventStartVerifyJob = 7,
    bEventBackupCommand = 9,
    bEventRestoreCommand = 10,
    bEventEstimateCommand = 11,
    bEventLevel = 12,
    bEventSince = 13,
    bEventCancelCommand = 14,
    bEventRestoreObject = 18,
    bEventEndFileSet = 19,
    bEventPluginCommand = 20,
};

enum { IO_OPEN = 1, IO_READ = 2, IO_WRITE = 3, IO_CLOSE = 4, IO_SEEK = 5 };

enum { BACL_BACKUP = 1, BACL_RESTORE = 2, BXATTR_BACKUP = 3, BXATTR_RESTORE = 4 };

enum { CF_SKIP = 1, CF_ERROR = 2, CF_EXTRACT = 3, CF_CREATED = 4, CF_CORE = 5 };

/* Kinds of files. */
enum {
    FT_LNKSAVED = 1,
    FT_REGE = 2,
    FT_REG = 3,
    FT_LNK = 4,
    FT_DIREND = 5,
    FT_SPEC = 6,
    FT_NOCHG = 10,
    FT_DIRNOCHG = 11,
    FT_RESTORE_FIRST = 25,
    FT_PLUGIN_CONFIG = 27,
    FT_PLUGIN_CONFIG_FILLED = 28,
};

#define GUESTSNAP_FO_SPARSE (1ULL << 5)

#endif
