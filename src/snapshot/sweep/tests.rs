use super::*;
use crate::hostdev::lvname::LvName;
use crate::snapshot::lvm::tests::snapshot;

fn lv(name: &str, tags: &[&str]) -> LvInfo {
    let mut lv = snapshot();
    lv.name = LvName::new("vg0", name).unwrap();
    lv.tags = tags.iter().map(|t| (*t).to_owned()).collect();
    lv
}

fn journal(job: &JobTag, object: Object) -> Vec<(String, Abandoned)> {
    let abandoned = Abandoned::for_test(job.clone(), object);
    vec![("x".to_owned(), abandoned)]
}

fn kept(verdict: Result<Verdict>) -> bool {
    matches!(verdict.unwrap(), Verdict::Keep(_))
}

fn alike(verdict: Result<Verdict>) -> bool {
    matches!(verdict.unwrap(), Verdict::Alike(_))
}

#[test]
fn test_a_journal_of_a_group_that_is_gone_ends() {
    let alive = JobTag::new(1).unwrap();
    let gone = alive.gone_for_test();
    let object = |vg: &str| Object::Lv {
        vg: VgName::new(vg).unwrap(),
        name: alive.name(1),
        origin: "domu".to_owned(),
        uuid: None,
    };
    let lvs = [lv("a", &[])];
    let settled = |job: &JobTag, vg: &str, groups| {
        let mut journals = journal(job, object(vg));
        let mut report = SweepReport::default();
        let mut groups = Groups(Some(groups));
        let journal = &mut journals[0].1;
        settle(
            "j",
            journal,
            &lvs,
            &HashSet::new(),
            &mut groups,
            &mut report,
        );
        (journal.contents.open.len(), report)
    };
    // The job, the group, whether the entry stays, and its count in the lists.
    for (job, vg, stays, kept, notes) in [
        (&alive, "vg0", false, 0, 0),
        (&alive, "empty", false, 0, 0),
        (&alive, "exported", true, 1, 0),
        (&gone, "gone", false, 0, 1),
        // Only the journal identifies it after a return.
        (&alive, "gone", true, 0, 1),
    ] {
        let groups = vec![("empty".to_owned(), 0), ("exported".to_owned(), 2)];
        let (open, report) = settled(job, vg, Ok(groups));
        assert_eq!(open, usize::from(stays), "{vg}");
        assert_eq!(
            (report.kept.len(), report.notes.len()),
            (kept, notes),
            "{vg}"
        );
    }
    // LVM gives no answer: the volume does not count as gone.
    let (open, report) = settled(&gone, "gone", Err("no lvm".to_owned()));
    assert_eq!(open, 1);
    assert_eq!(report.kept.len(), 1);
}

#[test]
fn test_a_journal_that_tells_nothing_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let gone = JobTag::new(1).unwrap().gone_for_test();
    let name = gone.journal_name();
    let path = folder.path().join(&name);
    for (text, why) in [
        ("", "it is empty"),
        (
            "{\"journal\":{\"version\":2,\"job\":null}}\n",
            "it has format version 2, and this guestsnap knows 1",
        ),
        ("nothing\n", "its first line is damaged"),
    ] {
        std::fs::write(&path, text).unwrap();
        let handle = journal::open_folder(folder.path()).unwrap();
        let mut report = SweepReport::default();
        let found = abandoned(folder.path(), &handle, &mut report).unwrap();
        assert!(found.is_empty() && path.exists());
        let [said] = &report.kept[..] else {
            panic!("{report:?}")
        };
        assert!(said.contains(why), "{said}");
        let remedy = format!("remove {} by hand", path.display());
        assert!(said.contains(&remedy), "{said}");
    }
}

#[test]
fn test_a_tagged_snapshot_goes_only_with_its_owner() {
    let alive = JobTag::new(1).unwrap();
    let gone = alive.gone_for_test();
    let (alive_tag, gone_tag) = (alive.to_lvm_tag(), gone.to_lvm_tag());
    let ours = gone.name(4);
    let judge = |lv: &LvInfo| judge(lv, &[]);
    let good = lv(&ours, &[TAG, &gone_tag]);
    assert_eq!(judge(&good).unwrap(), Verdict::Remove(gone.clone()));
    // From an earlier boot of this host, and from its clone, which may be running.
    let [host, _, rest] = gone_tag.rsplitn(3, ':').collect::<Vec<_>>()[..] else {
        panic!("{gone_tag}");
    };
    let earlier = format!("{rest}:another-boot:{host}");
    let removed = judge(&lv(&ours, &[TAG, &earlier])).unwrap();
    assert!(matches!(removed, Verdict::Remove(_)), "{removed:?}");
    assert!(alike(judge(&lv(&ours, &[TAG, &format!("{earlier}-2")]))));
    let running = judge(&lv(&ours, &[TAG, &alive_tag]));
    assert_eq!(running.unwrap(), Verdict::Nothing);
    assert_eq!(judge(&lv("mine", &[])).unwrap(), Verdict::Nothing);
    assert!(alike(judge(&lv(&ours, &[]))));
    assert!(alike(judge(&lv(&ours, &[TAG]))));
    assert!(alike(judge(&lv(&ours, &[&gone_tag]))));
    assert!(alike(judge(&lv("mine", &[TAG, &gone_tag]))));
    assert!(alike(judge(&lv(&format!("{ours}x"), &[TAG, &gone_tag]))));
    let mut plain = good.clone();
    plain.role = vec!["public".to_owned()];
    assert!(alike(judge(&plain)));
    let origin = |role: &str| {
        let mut origin = good.clone();
        origin.role.push(role.to_owned());
        judge(&origin)
    };
    assert!(kept(origin("thickorigin")));
    assert_eq!(origin("thinorigin").unwrap(), Verdict::Remove(gone));
}

#[test]
fn test_a_journal_needs_the_tags_of_its_job() {
    let job = JobTag::new(1).unwrap();
    let other = JobTag::new(1).unwrap();
    let name = job.name(1);
    let object = |uuid: Option<String>| Object::Lv {
        vg: VgName::new("vg0").unwrap(),
        name: name.clone(),
        origin: "domu".to_owned(),
        uuid,
    };
    let mut half_made = lv(&name, &[TAG, &job.to_lvm_tag()]);
    half_made.role = vec!["public".to_owned()];
    let by_name = journal(&job, object(None));
    // The process is alive, but the free lock shows that the job has ended.
    assert_eq!(
        judge(&half_made, &by_name).unwrap(),
        Verdict::Remove(job.clone())
    );
    assert!(alike(judge(&lv(&name, &[]), &by_name)));
    assert!(alike(judge(
        &lv(&name, &[TAG, &other.to_lvm_tag()]),
        &by_name
    )));
    let by_uuid = journal(&job, object(Some(half_made.uuid.to_string())));
    assert_eq!(
        judge(&half_made, &by_uuid).unwrap(),
        Verdict::Remove(job.clone())
    );
    let by_other_uuid = journal(&job, object(Some("other".to_owned())));
    assert_eq!(judge(&half_made, &by_other_uuid).unwrap(), Verdict::Nothing);
}
