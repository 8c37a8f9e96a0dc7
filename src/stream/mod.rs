//! Walking a guest's tree, its metadata and contents; and writing a restored tree.
