//! The short form of `pirouette stress`: everything it proves, a few seconds each.

use std::process::Command;

fn stress(rows: &str) {
    let pirouette = env!("CARGO_BIN_EXE_pirouette");
    let output = Command::new(pirouette)
        .args(["stress", "--short", "--only", rows])
        .output()
        .expect("the binary was built for this test");
    let (said, failed) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(output.status.success(), "{said}\n{failed}");
    assert!(!failed.contains("panicked"), "engines that are killed drown the table: {failed}");
    for row in rows.split(',') {
        assert!(said.contains(&format!("held   {row} ")), "{row} was run: {said}");
    }
}

// One after the other: beside each other they would measure each other.
#[test]
fn every_promise_holds_in_its_short_form() {
    stress("faults,one_of_two,swaps,interleavings");
    stress("frames,kills,half_open");
    stress("throughput,overhead,overload,replicas");
}
