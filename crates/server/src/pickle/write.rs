//! A chunk of actions → the list of `TimedAction` that LeRobot's client loads.
//!
//! The client uses Python's own unpickler, so an action is written as a call of `torch.tensor`
//! on a list of floats: no storage format of PyTorch's is needed, and what comes out is float32.

/// A chunk as LeRobot's client wants it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimedActions<'a> {
    /// Module of the client's `TimedAction`.
    pub module: &'a str,
    /// Row-major actions.
    pub actions: &'a [f64],
    /// Columns of a row.
    pub dims: usize,
    /// When the observation was taken, in seconds of the client's clock.
    pub timestamp: f64,
    /// Its step.
    pub timestep: i64,
    /// Seconds between actions.
    pub period: f64,
}

/// Remembered values, in the order in which they are remembered.
const CLASS: u8 = 0;
const TENSOR: u8 = 1;
const NAMES: [(&str, u8); 3] = [("timestamp", 2), ("timestep", 3), ("action", 4)];

/// The pickle, protocol 4.
pub fn write_actions(chunk: &TimedActions<'_>) -> Vec<u8> {
    let mut out = vec![0x80, 4];
    let rows = chunk.actions.chunks_exact(chunk.dims.max(1));
    out.reserve(64 + rows.len() * (48 + 9 * chunk.dims));
    // Names first, so that they are remembered: each is popped again.
    global(&mut out, chunk.module, "TimedAction");
    out.extend([0x94, b'0']);
    global(&mut out, "torch", "tensor");
    out.extend([0x94, b'0']);
    for (name, _) in NAMES {
        text(&mut out, name);
        out.extend([0x94, b'0']);
    }
    out.extend(b"](");
    for (i, row) in rows.enumerate() {
        out.extend([b'h', CLASS, b')', 0x81, b'}', b'(']);
        let [when, step, action] = NAMES.map(|(_, index)| index);
        out.extend([b'h', when]);
        float(&mut out, chunk.timestamp + i as f64 * chunk.period);
        out.extend([b'h', step]);
        integer(&mut out, chunk.timestep.saturating_add(i as i64));
        out.extend([b'h', action, b'h', TENSOR, b']', b'(']);
        row.iter().for_each(|x| float(&mut out, *x));
        // APPENDS, TUPLE1, REDUCE; SETITEMS, BUILD.
        out.extend([b'e', 0x85, b'R', b'u', b'b']);
    }
    out.extend(b"e.");
    out
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    text(out, module);
    text(out, name);
    out.push(0x93);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn float(out: &mut Vec<u8>, x: f64) {
    out.push(b'G');
    out.extend(x.to_be_bytes());
}

/// LONG1 of 8 bytes: steps may be beyond 32 bits.
fn integer(out: &mut Vec<u8>, n: i64) {
    out.extend([0x8a, 8]);
    out.extend(n.to_le_bytes());
}
