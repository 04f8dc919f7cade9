//! Any bytes as the body of any request: an error is the normal outcome, a panic is a bug.
//!
//! `cargo +nightly fuzz run request`

#![no_main]

use kvasir_server::{RequestKind, parse_request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for kind in RequestKind::ALL {
        if let Err(error) = parse_request(kind, bytes) {
            assert_eq!(error.status().as_u16(), 400);
            assert!(!error.message().is_empty());
        }
    }
});
