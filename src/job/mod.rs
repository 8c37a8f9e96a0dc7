//! The life of one job: plan, run, report, undo. Knows nothing of struct layouts.
