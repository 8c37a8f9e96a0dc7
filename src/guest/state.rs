//! Whether a guest is off, by the hypervisor that its definition belongs to.

use std::time::Duration;

use super::Guest;
use super::pve::{self, Handle};
use crate::config::ClientFile;
use crate::error::escape;
use crate::process::{self, find};
use crate::{Code, Error, Result};

/// Time limit of a question.
const PATIENCE: Duration = Duration::from_secs(30);

/// A question to a hypervisor.
#[derive(Debug, PartialEq, Eq)]
struct Question {
    command: Vec<String>,
    off: Answer,
}

/// The answer that means "off".
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// The command succeeds and says this.
    Says(&'static str),
    /// The command fails although the one given here succeeds.
    Fails(Vec<String>),
}

/// Checks that a guest with a definition is off. Without a definition, and where the hypervisor's
/// program is not installed, only the kernel's own view of the disks counts.
pub fn check_off(guest: &Guest, client: &ClientFile) -> Result<()> {
    let Some(question) = question(guest, client) else {
        return Ok(());
    };
    if question
        .command
        .first()
        .is_none_or(|name| find(name).is_err())
    {
        return Ok(());
    }
    let unclear = |why: &str| {
        let text = format!("{}: whether it is off is not clear: {why}", guest.name);
        Err(Error::new(Code::TargetBusy, text))
    };
    if let Some(doubt) = &guest.doubt {
        return unclear(doubt);
    }
    let shown = escape(question.command.join(" ").as_bytes());
    let ended = process::run(&question.command, PATIENCE, &|| false)?;
    let well = ended.status.success();
    match question.off {
        Answer::Says(word) if well && is_off(&ended.said, word) => Ok(()),
        Answer::Says(_) => {
            let text = format!("{}: {shown} says: {}", guest.name, ended.said);
            Err(Error::new(Code::TargetBusy, text))
        }
        Answer::Fails(_) if well => {
            let text = format!("{}: {shown} shows it", guest.name);
            Err(Error::new(Code::TargetBusy, text))
        }
        Answer::Fails(works) => match process::run(&works, PATIENCE, &|| false)? {
            ended if ended.status.success() => Ok(()),
            ended => unclear(&format!("{}: {}", works.join(" "), ended.said)),
        },
    }
}

/// Whether an answer means "off". A guest whose memory is saved is to go on with its old view of the disks.
fn is_off(said: &str, word: &str) -> bool {
    let rest = said.trim().strip_prefix(word);
    // virsh gives the reason: `shut off (saved)`.
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(" (") && rest != " (saved)")
}

/// `None`: no hypervisor knows it.
fn question(guest: &Guest, client: &ClientFile) -> Option<Question> {
    let name = guest.file.as_ref()?.name.to_str()?;
    let domain = client.domain(&guest.name);
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let (command, off) = match (guest.pve, name.rsplit_once('.')?.1) {
        (Some(handle), "conf") => {
            let program = match handle {
                Handle::Container => "pct",
                Handle::Machine { .. } => "qm",
            };
            let vmid = pve::vmid(name)?.to_string();
            let off = Answer::Says("status: stopped");
            (words(&[program, "status", &vmid]), off)
        }
        (_, "xml") => {
            let command = words(&["virsh", "domstate", "--domain", &domain, "--reason"]);
            (command, Answer::Says("shut off"))
        }
        (_, "cfg") => {
            let works = words(&["xl", "list", "Domain-0"]);
            (words(&["xl", "list", &domain]), Answer::Fails(works))
        }
        _ => return None,
    };
    Some(Question { command, off })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::DefinitionFile;
    use crate::guest::pve::Agent;

    #[test]
    fn test_a_guest_with_saved_memory_is_not_off() {
        for (said, off) in [
            ("shut off (shutdown)\n", true),
            ("shut off (unknown)", true),
            ("shut off", true),
            ("shut off (saved)\n", false),
            ("running (booted)", false),
            ("shut offline", false),
            ("", false),
        ] {
            assert_eq!(is_off(said, "shut off"), off, "{said}");
        }
    }

    #[test]
    fn test_the_hypervisor_of_the_definition_is_asked() {
        let guest = |file: Option<&str>, pve| Guest {
            name: "web1".into(),
            disks: Vec::new(),
            disk_names: Vec::new(),
            places: Vec::new(),
            uncovered: Vec::new(),
            file: file.map(|name| DefinitionFile::new(name.as_ref(), b"")),
            pve,
            doubt: None,
        };
        let client = ClientFile::parse("[guest.web1]\ndomain = 'w1'\n").unwrap();
        let machine = Some(Handle::Machine {
            vmid: 101,
            agent: Agent::Off,
        });
        let cases = [
            (Some("web1.cfg"), None, "xl list w1"),
            (
                Some("web1.xml"),
                None,
                "virsh domstate --domain w1 --reason",
            ),
            (Some("101.conf"), machine, "qm status 101"),
            (Some("102.conf"), Some(Handle::Container), "pct status 102"),
            (None, None, ""),
        ];
        for (file, pve, expected) in cases {
            let asked = question(&guest(file, pve), &client);
            let command = asked.map(|q| q.command.join(" ")).unwrap_or_default();
            assert_eq!(command, expected);
        }
    }
}
