//! Spans on tracks → a trace in Chrome's JSON format, for Perfetto or chrome://tracing.

use serde_json::{Value, json};

/// Where spans are drawn: tracks (`tid`) grouped by process (`pid`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Track {
    /// The group.
    pub pid: u32,
    /// The track within it.
    pub tid: u32,
}

/// A trace being written. Times are milliseconds from any common zero; the format wants
/// microseconds and gets them.
#[derive(Debug, Default)]
pub struct ChromeTrace {
    names: Vec<String>,
    /// Begin, minus duration, text: so ordered, a span comes before those inside it.
    events: Vec<(f64, f64, String)>,
}

impl ChromeTrace {
    /// An empty one.
    pub fn new() -> Self {
        ChromeTrace::default()
    }

    /// Names a group of tracks.
    pub fn process(&mut self, pid: u32, name: &str) {
        self.name("process_name", Track { pid, tid: 0 }, name);
    }

    /// Names a track.
    pub fn track(&mut self, track: Track, name: &str) {
        self.name("thread_name", track, name);
    }

    fn name(&mut self, what: &str, Track { pid, tid }: Track, name: &str) {
        let args = json!({ "name": name });
        let event =
            json!({ "name": what, "ph": "M", "ts": 0.0, "pid": pid, "tid": tid, "args": args });
        self.names.push(event.to_string());
    }

    /// Something that began at `at_ms` and took `ms`. Spans of one track must nest.
    pub fn span(
        &mut self,
        Track { pid, tid }: Track,
        name: &str,
        category: &str,
        (at_ms, ms): (f64, f64),
        args: Value,
    ) {
        let event = json!({
            "name": name, "cat": category, "ph": "X", "pid": pid, "tid": tid,
            "ts": at_ms * 1e3, "dur": ms * 1e3, "args": args,
        });
        self.events.push((at_ms, -ms, event.to_string()));
    }

    /// An arrow from what is drawn on one track at one time to what is drawn on another.
    pub fn arrow(&mut self, id: u64, name: &str, from: (Track, f64), to: (Track, f64)) {
        for ((Track { pid, tid }, at_ms), phase) in [(from, "s"), (to, "f")] {
            let mut event = json!({
                "name": name, "cat": "flow", "ph": phase, "id": id, "pid": pid, "tid": tid,
                "ts": at_ms * 1e3,
            });
            if phase == "f" {
                // Bound to the span around this time, not to the next one that begins.
                event["bp"] = "e".into();
            }
            self.events.push((at_ms, 0.0, event.to_string()));
        }
    }

    /// The JSON: names first, then events by time. `about` is kept with the trace as it is.
    pub fn finish(mut self, about: &Value) -> String {
        self.events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let mut out = format!("{{\"displayTimeUnit\":\"ms\",\"otherData\":{about},");
        out.push_str("\"traceEvents\":[\n");
        let texts = self.names.iter().chain(self.events.iter().map(|e| &e.2));
        for (i, text) in texts.enumerate() {
            out.push_str(if i == 0 { "" } else { ",\n" });
            out.push_str(text);
        }
        out.push_str("\n]}\n");
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_ordered_and_parents_come_first() {
        let mut trace = ChromeTrace::new();
        let (a, b) = (Track { pid: 1, tid: 1 }, Track { pid: 1, tid: 2 });
        trace.span(a, "child", "c", (1.0, 2.0), json!({}));
        trace.span(a, "parent", "c", (1.0, 5.0), json!({ "n": 3 }));
        trace.arrow(7, "goes", (a, 0.5), (b, 1.0));
        trace.span(b, "earlier", "c", (0.25, 9.0), json!({}));
        trace.process(1, "a \"quoted\" name");
        trace.track(b, "b");
        let json: Value = serde_json::from_str(&trace.finish(&json!({ "dropped": 0 }))).unwrap();
        assert_eq!(json["otherData"]["dropped"], 0);
        let events = json["traceEvents"].as_array().unwrap();
        let of = |key: &str| events.iter().map(|e| e[key].clone()).collect::<Vec<_>>();
        assert_eq!(of("ph"), ["M", "M", "X", "s", "X", "X", "f"]);
        assert_eq!(of("name")[2..6], ["earlier", "goes", "parent", "child"]);
        assert_eq!(events[0]["args"]["name"], "a \"quoted\" name");
        assert_eq!((&events[4]["ts"], &events[4]["dur"]), (&json!(1000.0), &json!(5000.0)));
        assert_eq!((&events[6]["bp"], &events[6]["id"]), (&json!("e"), &json!(7)));
    }
}
