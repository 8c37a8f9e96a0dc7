//! The four layouts of the daemon's interface.
//!
//! The version is chosen once, in `loadPlugin`, from the number that the daemon reports of itself.

use std::ffi::{c_char, c_int, c_void};

macro_rules! generated {
    ($name:ident, $file:literal) => {
        #[expect(
            non_camel_case_types,
            non_snake_case,
            non_upper_case_globals,
            dead_code,
            unused_imports,
            unreachable_pub,
            reason = "generated from include/bacula_fd_abi.h, in the header's own names"
        )]
        pub mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $file));
        }
    };
}

generated!(v14, "abi_14.rs");
generated!(v21, "abi_21.rs");
generated!(v22, "abi_22.rs");
generated!(v23, "abi_23.rs");

// The parts that are the same in every version, under one name. `bFuncs` only grows at its end.
pub use v14::{bEvent, bFuncs, bInfo, bpContext, io_pkt, pInfo, restore_object_pkt, xacl_pkt};
pub use v21::query_pkt;

/// Constants with one numbering in all versions.
pub mod number {
    use super::v14;
    use std::ffi::c_int;

    macro_rules! numbers {
        ($($name:ident = $from:ident;)*) => {
            $(
                #[doc = concat!("`", stringify!($from), "`")]
                pub const $name: c_int = v14::$from as c_int;
            )*
        };
    }

    numbers! {
        RC_OK = bRC_OK;
        RC_ERROR = bRC_Error;
        RC_MORE = bRC_More;
        RC_SEEN = bRC_Seen;
        RC_SKIP = bRC_Skip;
        RC_MAX = bRC_Max;
        EVENT_JOB_END = bEventJobEnd;
        EVENT_START_BACKUP_JOB = bEventStartBackupJob;
        EVENT_END_BACKUP_JOB = bEventEndBackupJob;
        EVENT_END_RESTORE_JOB = bEventEndRestoreJob;
        EVENT_START_VERIFY_JOB = bEventStartVerifyJob;
        EVENT_BACKUP_COMMAND = bEventBackupCommand;
        EVENT_RESTORE_COMMAND = bEventRestoreCommand;
        EVENT_ESTIMATE_COMMAND = bEventEstimateCommand;
        EVENT_LEVEL = bEventLevel;
        EVENT_SINCE = bEventSince;
        EVENT_CANCEL_COMMAND = bEventCancelCommand;
        EVENT_PLUGIN_COMMAND = bEventPluginCommand;
        EVENT_RESTORE_OBJECT = bEventRestoreObject;
        VAR_JOB_ID = bVarJobId;
        VAR_JOB_NAME = bVarJobName;
        VAR_JOB_STATUS = bVarJobStatus;
        VAR_ACCURATE = bVarAccurate;
        VAR_FILE_SEEN = bVarFileSeen;
        VAR_WORKING_DIR = bVarWorkingDir;
        IO_OPEN = IO_OPEN;
        IO_READ = IO_READ;
        IO_WRITE = IO_WRITE;
        IO_CLOSE = IO_CLOSE;
        IO_SEEK = IO_SEEK;
        ACL_BACKUP = BACL_BACKUP;
        XATTR_BACKUP = BXATTR_BACKUP;
        XATTR_RESTORE = BXATTR_RESTORE;
        CF_SKIP = CF_SKIP;
        CF_ERROR = CF_ERROR;
        CF_EXTRACT = CF_EXTRACT;
        CF_CREATED = CF_CREATED;
        FT_LNKSAVED = FT_LNKSAVED;
        FT_REGE = FT_REGE;
        FT_REG = FT_REG;
        FT_LNK = FT_LNK;
        FT_DIREND = FT_DIREND;
        FT_SPEC = FT_SPEC;
        FT_PLUGIN_CONFIG = FT_PLUGIN_CONFIG;
        FT_PLUGIN_CONFIG_FILLED = FT_PLUGIN_CONFIG_FILLED;
    }
}

/// `FO_SPARSE`, in every version.
pub const FO_SPARSE: u64 = v14::GUESTSNAP_FO_SPARSE as u64;

/// An interface version of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Bacula 9.0 to 9.6.
    V14,
    /// Bacula 11.0.
    V21,
    /// Bacula 11.3 and 13.0.
    V22,
    /// Bacula 15.0.
    V23,
}

/// Runs `$body` with `$abi` as the generated module of the version.
macro_rules! with_version {
    ($version:expr, $abi:ident => $body:expr) => {
        match $version {
            Version::V14 => {
                use v14 as $abi;
                $body
            }
            Version::V21 => {
                use v21 as $abi;
                $body
            }
            Version::V22 => {
                use v22 as $abi;
                $body
            }
            Version::V23 => {
                use v23 as $abi;
                $body
            }
        }
    };
}

/// Numbers that differ between versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// `M_FATAL`
    pub fatal: c_int,
    /// `M_ERROR`
    pub error: c_int,
    /// `M_WARNING`
    pub warning: c_int,
    /// `M_INFO`
    pub info: c_int,
    /// `bVarFileIndex`
    pub var_file_index: c_int,
    /// `bVarPrevJobName`
    pub var_previous_job: c_int,
    /// `bVarIsCanceled`, from 11.0 on.
    pub var_is_cancelled: Option<c_int>,
}

/// The functions we give to the daemon, in no version's order.
#[derive(Debug, Clone, Copy)]
pub struct Callbacks {
    /// A connection issued a JobId.
    pub new_plugin: unsafe extern "C" fn(*mut bpContext) -> c_int,
    /// Its end; always called.
    pub free_plugin: unsafe extern "C" fn(*mut bpContext) -> c_int,
    /// Values of the plugin; none.
    pub plugin_value: unsafe extern "C" fn(*mut bpContext, c_int, *mut c_void) -> c_int,
    /// Events.
    pub event: unsafe extern "C" fn(*mut bpContext, *mut bEvent, *mut c_void) -> c_int,
    /// The next file, please. The packet's layout is the version's.
    pub start_backup_file: unsafe extern "C" fn(*mut bpContext, *mut c_void) -> c_int,
    /// The file was sent.
    pub end_backup_file: unsafe extern "C" fn(*mut bpContext) -> c_int,
    /// A file is coming.
    pub start_restore_file: unsafe extern "C" fn(*mut bpContext, *const c_char) -> c_int,
    /// It has come.
    pub end_restore_file: unsafe extern "C" fn(*mut bpContext) -> c_int,
    /// Data.
    pub io: unsafe extern "C" fn(*mut bpContext, *mut io_pkt) -> c_int,
    /// Make the file.
    pub create_file: unsafe extern "C" fn(*mut bpContext, *mut c_void) -> c_int,
    /// Its attributes.
    pub set_attributes: unsafe extern "C" fn(*mut bpContext, *mut c_void) -> c_int,
    /// Is a file of the accurate list still there?
    pub check_file: unsafe extern "C" fn(*mut bpContext, *mut c_char) -> c_int,
    /// ACL and extended attributes.
    pub xacl: unsafe extern "C" fn(*mut bpContext, *mut xacl_pkt) -> c_int,
    /// `.query`, from 11.0 on.
    pub query: unsafe extern "C" fn(*mut bpContext, *mut query_pkt) -> c_int,
    /// Metadata of 13.0 and later; we send none.
    pub metadata_restore: unsafe extern "C" fn(*mut bpContext, *mut c_void) -> c_int,
}

impl Version {
    /// The version behind the daemon's number; `None` when we do not know its layout.
    pub fn from_number(number: u32) -> Option<Version> {
        match number {
            14 => Some(Version::V14),
            21 => Some(Version::V21),
            22 => Some(Version::V22),
            23 => Some(Version::V23),
            _ => None,
        }
    }

    /// The daemon's number.
    pub fn number(self) -> u32 {
        match self {
            Version::V14 => 14,
            Version::V21 => 21,
            Version::V22 => 22,
            Version::V23 => 23,
        }
    }

    /// Numbers of this version.
    pub fn numbers(self) -> Numbers {
        with_version!(self, abi => Numbers {
            fatal: abi::M_FATAL as c_int,
            error: abi::M_ERROR as c_int,
            warning: abi::M_WARNING as c_int,
            info: abi::M_INFO as c_int,
            var_file_index: abi::bVarFileIndex as c_int,
            var_previous_job: abi::bVarPrevJobName as c_int,
            var_is_cancelled: match abi::bVarIsCanceled as c_int {
                0 => None,
                number => Some(number),
            },
        })
    }

    /// The table of our functions in this version's order, as the daemon keeps it: for ever.
    pub fn table(self, c: &Callbacks) -> *mut c_void {
        // The packets differ by version behind one pointer: the callbacks take it untyped.
        macro_rules! cast {
            ($f:expr, ($($arg:ty),*)) => {
                // SAFETY: both are C functions with the same number and passing of arguments;
                // only the type behind the packet pointer has another name.
                Some(unsafe {
                    std::mem::transmute::<*const (), unsafe extern "C" fn($($arg),*) -> c_int>($f as *const ())
                })
            };
        }
        macro_rules! common {
            ($abi:ident, { $($more:tt)* }) => {
                Box::into_raw(Box::new($abi::pFuncs {
                    size: size_of::<$abi::pFuncs>() as u32,
                    version: self.number(),
                    newPlugin: cast!(c.new_plugin, (*mut $abi::bpContext)),
                    freePlugin: cast!(c.free_plugin, (*mut $abi::bpContext)),
                    getPluginValue: cast!(c.plugin_value, (*mut $abi::bpContext, c_int, *mut c_void)),
                    setPluginValue: cast!(c.plugin_value, (*mut $abi::bpContext, c_int, *mut c_void)),
                    handlePluginEvent: cast!(c.event, (*mut $abi::bpContext, *mut $abi::bEvent, *mut c_void)),
                    startBackupFile: cast!(c.start_backup_file, (*mut $abi::bpContext, *mut $abi::save_pkt)),
                    endBackupFile: cast!(c.end_backup_file, (*mut $abi::bpContext)),
                    startRestoreFile: cast!(c.start_restore_file, (*mut $abi::bpContext, *const c_char)),
                    endRestoreFile: cast!(c.end_restore_file, (*mut $abi::bpContext)),
                    pluginIO: cast!(c.io, (*mut $abi::bpContext, *mut $abi::io_pkt)),
                    createFile: cast!(c.create_file, (*mut $abi::bpContext, *mut $abi::restore_pkt)),
                    setFileAttributes: cast!(c.set_attributes, (*mut $abi::bpContext, *mut $abi::restore_pkt)),
                    checkFile: cast!(c.check_file, (*mut $abi::bpContext, *mut c_char)),
                    handleXACLdata: cast!(c.xacl, (*mut $abi::bpContext, *mut $abi::xacl_pkt)),
                    checkStream: std::ptr::null_mut(),
                    $($more)*
                }))
                .cast()
            };
        }
        macro_rules! query {
            ($abi:ident) => {
                cast!(c.query, (*mut $abi::bpContext, *mut $abi::query_pkt))
            };
        }
        macro_rules! meta {
            ($abi:ident) => {
                cast!(c.metadata_restore, (*mut $abi::bpContext, *mut c_void))
            };
        }
        let none = std::ptr::null_mut();
        match self {
            Version::V14 => common!(v14, {}),
            Version::V21 => common!(v21, { restoreFileList: none, queryParameter: query!(v21), }),
            Version::V22 => common!(v22, {
                restoreFileList: none, queryParameter: query!(v22), metadataRestore: meta!(v22),
            }),
            Version::V23 => common!(v23, {
                restoreFileList: none, queryParameter: query!(v23), metadataRestore: meta!(v23),
                startVerifyFile: none, endVerifyFile: none,
            }),
        }
    }
}

/// Sizes and offsets as recorded with a compiler from each release's own headers (9.6.7, 11.0.6,
/// 13.0.3, 15.0.3). A mistake in our header does not compile.
#[cfg(target_arch = "x86_64")]
mod recorded {
    macro_rules! recorded {
        ($abi:ident: $($name:ident $size:literal { $($field:ident $offset:literal),* })*) => {
            $(
                const _: () = assert!(size_of::<super::$abi::$name>() == $size);
                $(const _: () = assert!(std::mem::offset_of!(super::$abi::$name, $field) == $offset);)*
            )*
        };
    }

    recorded!(v14:
        save_pkt 240 { pkt_size 0, fname 8, link 16, statp 24, type_ 168, flags 176, no_read 184, portable 185, accurate_found 186, cmd 192, delta_seq 200, object_name 208, object 216, object_len 224, index 228, LinkFI 232, pkt_end 236 }
        restore_pkt 232 { pkt_size 0, stream 4, data_stream 8, type_ 12, file_index 16, LinkFI 20, uid 24, statp 32, attrEx 176, ofname 184, olname 192, where_ 200, RegexWhere 208, replace 216, create_status 220, delta_seq 224, pkt_end 228 }
        io_pkt 72 { pkt_size 0, func 4, count 8, flags 12, mode 16, buf 24, fname 32, status 40, io_errno 44, lerror 48, whence 52, offset 56, win32 64, pkt_end 68 }
        xacl_pkt 32 { pkt_size 0, func 4, count 8, content 16, pkt_end 24 }
        restore_object_pkt 64 { pkt_size 0, object_name 8, object 16, plugin_name 24, object_type 32, object_len 36, object_full_len 40, object_index 44, object_compression 48, stream 52, JobId 56, pkt_end 60 }
        bFuncs 144 { size 0, version 4, registerBaculaEvents 8, getBaculaValue 16, setBaculaValue 24, JobMessage 32, DebugMessage 40, baculaMalloc 48, baculaFree 56, AddExclude 64, AddInclude 72, AddOptions 80, AddRegex 88, AddWild 96, NewOptions 104, NewInclude 112, NewPreInclude 120, checkChanges 128, AcceptFile 136 }
        pInfo 56 { plugin_magic 8, plugin_description 48 }
        pFuncs 128 { size 0, version 4, newPlugin 8, freePlugin 16, getPluginValue 24, setPluginValue 32, handlePluginEvent 40, startBackupFile 48, endBackupFile 56, startRestoreFile 64, endRestoreFile 72, pluginIO 80, createFile 88, setFileAttributes 96, checkFile 104, handleXACLdata 112, checkStream 120 }
    );
    recorded!(v21:
        save_pkt 256 { pkt_size 0, fname 8, snap_fname 16, plugin_mode 24, link 32, statp 40, type_ 184, flags 192, no_read 200, portable 201, accurate_found 202, do_dedup 203, cmd 208, delta_seq 216, object_name 224, object 232, object_len 240, index 244, LinkFI 248, pkt_end 252 }
        restore_pkt 232 { pkt_size 0, plugin_mode 4, stream 8, data_stream 12, type_ 16, file_index 20, LinkFI 24, uid 28, statp 32, attrEx 176, ofname 184, olname 192, where_ 200, RegexWhere 208, replace 216, create_status 220, delta_seq 224, pkt_end 228 }
        io_pkt 72 { pkt_size 0, func 4, count 8, flags 12, mode 16, buf 24, fname 32, status 40, io_errno 44, lerror 48, whence 52, offset 56, win32 64, pkt_end 68 }
        xacl_pkt 32 { pkt_size 0, func 4, count 8, content 16, pkt_end 24 }
        restore_object_pkt 64 { pkt_size 0, object_name 8, object 16, plugin_name 24, object_type 32, object_len 36, object_full_len 40, object_index 44, object_compression 48, stream 52, JobId 56, pkt_end 60 }
        query_pkt 48 { pkt_size 0, parameter 8, command 16, api_opts 24, result 32, pkt_end 40 }
        bFuncs 144 { size 0, version 4, registerBaculaEvents 8, getBaculaValue 16, setBaculaValue 24, JobMessage 32, DebugMessage 40, baculaMalloc 48, baculaFree 56, AddExclude 64, AddInclude 72, AddOptions 80, AddRegex 88, AddWild 96, NewOptions 104, NewInclude 112, NewPreInclude 120, checkChanges 128, AcceptFile 136 }
        pInfo 56 { plugin_magic 8, plugin_description 48 }
        pFuncs 144 { size 0, version 4, newPlugin 8, freePlugin 16, getPluginValue 24, setPluginValue 32, handlePluginEvent 40, startBackupFile 48, endBackupFile 56, startRestoreFile 64, endRestoreFile 72, pluginIO 80, createFile 88, setFileAttributes 96, checkFile 104, handleXACLdata 112, restoreFileList 120, checkStream 128, queryParameter 136 }
    );
    recorded!(v22:
        save_pkt 344 { pkt_size 0, fname 8, snap_fname 16, plugin_mode 24, link 32, statp 40, type_ 184, flags 192, no_read 200, portable 201, accurate_found 202, do_dedup 203, cmd 208, restore_obj 216, plugin_obj 248, plug_meta 320, delta_seq 328, LinkFI 332, pkt_end 336 }
        restore_pkt 232 { pkt_size 0, plugin_mode 4, stream 8, data_stream 12, type_ 16, file_index 20, LinkFI 24, uid 28, statp 32, attrEx 176, ofname 184, olname 192, where_ 200, RegexWhere 208, replace 216, create_status 220, delta_seq 224, pkt_end 228 }
        io_pkt 72 { pkt_size 0, func 4, count 8, flags 12, mode 16, buf 24, fname 32, status 40, io_errno 44, lerror 48, whence 52, offset 56, win32 64, pkt_end 68 }
        xacl_pkt 32 { pkt_size 0, func 4, count 8, content 16, pkt_end 24 }
        restore_object_pkt 64 { pkt_size 0, object_name 8, object 16, plugin_name 24, object_type 32, object_len 36, object_full_len 40, object_index 44, object_compression 48, stream 52, JobId 56, pkt_end 60 }
        query_pkt 48 { pkt_size 0, parameter 8, command 16, api_opts 24, result 32, pkt_end 40 }
        bFuncs 152 { size 0, version 4, registerBaculaEvents 8, getBaculaValue 16, setBaculaValue 24, JobMessage 32, DebugMessage 40, baculaMalloc 48, baculaFree 56, AddExclude 64, AddInclude 72, AddOptions 80, AddRegex 88, AddWild 96, NewOptions 104, NewInclude 112, NewPreInclude 120, checkChanges 128, AcceptFile 136, getAccurateAttribs 144 }
        pInfo 56 { plugin_magic 8, plugin_description 48 }
        pFuncs 152 { size 0, version 4, newPlugin 8, freePlugin 16, getPluginValue 24, setPluginValue 32, handlePluginEvent 40, startBackupFile 48, endBackupFile 56, startRestoreFile 64, endRestoreFile 72, pluginIO 80, createFile 88, setFileAttributes 96, checkFile 104, handleXACLdata 112, restoreFileList 120, checkStream 128, queryParameter 136, metadataRestore 144 }
    );
    recorded!(v23:
        save_pkt 344 { pkt_size 0, fname 8, snap_fname 16, plugin_mode 24, link 32, statp 40, type_ 184, flags 192, no_read 200, portable 201, accurate_found 202, do_dedup 203, stat_update 204, cmd 208, restore_obj 216, plugin_obj 248, plug_meta 320, delta_seq 328, LinkFI 332, pkt_end 336 }
        restore_pkt 232 { pkt_size 0, plugin_mode 4, stream 8, data_stream 12, type_ 16, file_index 20, LinkFI 24, uid 28, statp 32, attrEx 176, ofname 184, olname 192, where_ 200, RegexWhere 208, replace 216, create_status 220, delta_seq 224, pkt_end 228 }
        io_pkt 72 { pkt_size 0, func 4, count 8, flags 12, mode 16, buf 24, fname 32, status 40, io_errno 44, lerror 48, whence 52, offset 56, win32 64, pkt_end 68 }
        xacl_pkt 32 { pkt_size 0, func 4, count 8, content 16, pkt_end 24 }
        restore_object_pkt 64 { pkt_size 0, object_name 8, object 16, plugin_name 24, object_type 32, object_len 36, object_full_len 40, object_index 44, object_compression 48, stream 52, JobId 56, pkt_end 60 }
        query_pkt 48 { pkt_size 0, parameter 8, command 16, api_opts 24, result 32, pkt_end 40 }
        bFuncs 168 { size 0, version 4, registerBaculaEvents 8, getBaculaValue 16, setBaculaValue 24, JobMessage 32, DebugMessage 40, baculaMalloc 48, baculaFree 56, AddExclude 64, AddInclude 72, AddOptions 80, AddRegex 88, AddWild 96, NewOptions 104, NewInclude 112, NewPreInclude 120, checkChanges 128, AcceptFile 136, getAccurateAttribs 144, AddPlugin 152, AddFileEvent 160 }
        pInfo 56 { plugin_magic 8, plugin_description 48 }
        pFuncs 168 { size 0, version 4, newPlugin 8, freePlugin 16, getPluginValue 24, setPluginValue 32, handlePluginEvent 40, startBackupFile 48, endBackupFile 56, startRestoreFile 64, endRestoreFile 72, pluginIO 80, createFile 88, setFileAttributes 96, checkFile 104, handleXACLdata 112, restoreFileList 120, checkStream 128, queryParameter 136, metadataRestore 144, startVerifyFile 152, endVerifyFile 160 }
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_numbers_differ_as_recorded() {
        assert_eq!(Version::V14.numbers().fatal, 3);
        assert_eq!(Version::V23.numbers().fatal, 4);
        assert_eq!(Version::V21.numbers().var_file_index, 22);
        assert_eq!(Version::V14.numbers().var_is_cancelled, None);
        assert_eq!(Version::V21.numbers().var_is_cancelled, Some(26));
    }

    #[test]
    fn test_unknown_version_is_refused() {
        for number in [0, 13, 15, 20, 24, u32::MAX] {
            assert_eq!(Version::from_number(number), None);
        }
        for number in [14, 21, 22, 23] {
            assert_eq!(
                Version::from_number(number).map(Version::number),
                Some(number)
            );
        }
    }
}
