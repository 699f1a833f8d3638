//! Bytes of a CUPTI activity record → what ran, when, and which graph node it was.
//!
//! Records are C structs that grow at their end from one version of CUPTI to the next. The fields
//! read here have kept their offsets since CUDA 12.4; the tests name the structs and versions whose
//! headers were compiled to print them.

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivityKind {
    /// A kernel.
    Kernel,
    /// A copy.
    Copy,
    /// A fill.
    Fill,
}

impl ActivityKind {
    /// All that are collected.
    pub const ALL: [ActivityKind; 3] =
        [ActivityKind::Kernel, ActivityKind::Copy, ActivityKind::Fill];

    /// `CUpti_ActivityKind`: CONCURRENT_KERNEL, MEMCPY, MEMSET.
    pub(super) const fn id(self) -> u32 {
        match self {
            ActivityKind::Kernel => 10,
            ActivityKind::Copy => 1,
            ActivityKind::Fill => 2,
        }
    }

    const fn layout(self) -> Layout {
        match self {
            ActivityKind::Kernel => Layout {
                device: 40,
                stream: 48,
                correlation: 92,
                name: Some(104),
                node: 144,
                graph: 156,
                bytes: 208,
            },
            ActivityKind::Copy | ActivityKind::Fill => Layout {
                device: 32,
                stream: 40,
                correlation: 44,
                name: None,
                node: 64,
                graph: 72,
                bytes: 88,
            },
        }
    }
}

const START: usize = 16;
const END: usize = 24;

/// Offsets of the fields that differ, and the size of the oldest version of the struct.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    device: usize,
    stream: usize,
    correlation: usize,
    name: Option<usize>,
    node: usize,
    graph: usize,
    bytes: usize,
}

// Every field lies inside the oldest struct.
const _: () = {
    let mut i = 0;
    while i < 3 {
        let l = ActivityKind::ALL[i].layout();
        assert!(l.node + 8 <= l.bytes && l.graph + 4 <= l.bytes && l.correlation + 4 <= l.bytes);
        assert!(l.device + 4 <= l.bytes && l.stream + 4 <= l.bytes && END + 8 <= l.bytes);
        i += 1;
    }
};

/// Something the device did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    /// What.
    pub kind: ActivityKind,
    /// When it began, nanoseconds on CUPTI's clock.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// The same for all nodes of one launch of a graph.
    pub correlation: u32,
    /// The graph node it was; 0 outside a graph.
    pub node: u64,
    /// The graph; 0 outside one.
    pub graph: u32,
    /// The device.
    pub device: u32,
    /// The stream.
    pub stream: u32,
    /// The kernel's symbol.
    pub name: Option<String>,
}

/// A record's fields and the address of the kernel's name; `None` for other kinds of records.
///
/// # Errors
/// A record that is too short or ends before it begins.
pub(super) fn parse(record: &[u8]) -> Result<Option<(Activity, u64)>, String> {
    let u32_at = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(record.get(at..at + 4)?.try_into().ok()?))
    };
    let u64_at = |at: usize| -> Option<u64> {
        Some(u64::from_ne_bytes(record.get(at..at + 8)?.try_into().ok()?))
    };
    let id = u32_at(0).ok_or("an empty record")?;
    let Some(kind) = ActivityKind::ALL.into_iter().find(|kind| kind.id() == id) else {
        return Ok(None);
    };
    let l = kind.layout();
    if record.len() < l.bytes {
        let (got, want) = (record.len(), l.bytes);
        return Err(format!("a record of kind {id} has {got} bytes, at least {want} are known"));
    }
    let read = || {
        let activity = Activity {
            kind,
            start_ns: u64_at(START)?,
            end_ns: u64_at(END)?,
            correlation: u32_at(l.correlation)?,
            node: u64_at(l.node)?,
            graph: u32_at(l.graph)?,
            device: u32_at(l.device)?,
            stream: u32_at(l.stream)?,
            name: None,
        };
        let name = l.name.map_or(Some(0), u64_at)?;
        Some((activity, name))
    };
    let (activity, name) = read().ok_or("a record is too short")?;
    if activity.start_ns == 0 || activity.end_ns < activity.start_ns {
        return Err(format!(
            "a record of kind {id} begins at {} and ends at {}: its layout is not the known one, \
             or no times were taken",
            activity.start_ns, activity.end_ns
        ));
    }
    Ok(Some((activity, name)))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Bytes of a record as CUPTI writes it, `size` long; fields that are not read hold anything.
    pub fn record(a: &Activity, name: u64, size: usize) -> Vec<u8> {
        let l = a.kind.layout();
        let mut bytes = vec![0xa5; size];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &a.kind.id().to_ne_bytes());
        put(START, &a.start_ns.to_ne_bytes());
        put(END, &a.end_ns.to_ne_bytes());
        put(l.correlation, &a.correlation.to_ne_bytes());
        put(l.node, &a.node.to_ne_bytes());
        put(l.graph, &a.graph.to_ne_bytes());
        put(l.device, &a.device.to_ne_bytes());
        put(l.stream, &a.stream.to_ne_bytes());
        if let Some(at) = l.name {
            put(at, &name.to_ne_bytes());
        }
        bytes
    }

    fn activity(kind: ActivityKind) -> Activity {
        Activity {
            kind,
            start_ns: 0x0102_0304_0506_0708,
            end_ns: 0x0102_0304_0506_1708,
            correlation: 77,
            node: 0x1_0000_0009,
            graph: 5,
            device: 3,
            stream: 13,
            name: None,
        }
    }

    /// `offsetof` and `sizeof` as gcc prints them for these structs.
    #[test]
    fn offsets_are_those_of_the_headers() {
        let kernel = ActivityKind::Kernel.layout();
        for (version, structure, bytes) in [
            ("12.4 (22)", "CUpti_ActivityKernel9", 208),
            ("12.9 (28)", "CUpti_ActivityKernel9", 208),
            ("13.0 (130001)", "CUpti_ActivityKernel10", 216),
            ("13.4 (130401)", "CUpti_ActivityKernel13", 248),
        ] {
            let l = kernel;
            assert_eq!((START, END, l.device, l.stream), (16, 24, 40, 48), "{structure}");
            let (name, node) = (l.name, l.node);
            assert_eq!((l.correlation, name, node, l.graph), (92, Some(104), 144, 156));
            assert!(l.bytes <= bytes, "{structure} of CUPTI {version}");
        }
        for (version, structure, bytes) in [
            ("12.4 (22)", "CUpti_ActivityMemcpy5", 88),
            ("12.9 (28)", "CUpti_ActivityMemcpy6", 96),
            ("13.0 (130001)", "CUpti_ActivityMemcpy6", 96),
            ("13.4 (130401)", "CUpti_ActivityMemcpy7", 112),
            ("12.4 (22)", "CUpti_ActivityMemset4", 88),
            ("13.0 (130001)", "CUpti_ActivityMemset4", 88),
            ("13.4 (130401)", "CUpti_ActivityMemset5", 104),
        ] {
            for kind in [ActivityKind::Copy, ActivityKind::Fill] {
                let l = kind.layout();
                assert_eq!((l.device, l.stream, l.correlation), (32, 40, 44), "{structure}");
                assert_eq!((l.node, l.graph, l.name), (64, 72, None));
                assert!(l.bytes <= bytes, "{structure} of CUPTI {version}");
            }
        }
        assert_eq!(ActivityKind::ALL.map(ActivityKind::id), [10, 1, 2]);
    }

    #[test]
    fn records_of_every_length_are_read() {
        for kind in ActivityKind::ALL {
            for extra in [0, 8, 40] {
                let want = activity(kind);
                let bytes = record(&want, 0xdead_beef, kind.layout().bytes + extra);
                let (got, name) = parse(&bytes).unwrap().unwrap();
                assert_eq!(got, want);
                assert_eq!(name, if kind == ActivityKind::Kernel { 0xdead_beef } else { 0 });
            }
        }
    }

    #[test]
    fn what_is_no_record_is_refused_or_left_out() {
        let good = record(&activity(ActivityKind::Kernel), 0, 216);
        for short in [0, 3, 4, 200, 207] {
            assert!(parse(&good[..short]).is_err(), "{short} bytes");
        }
        let mut other = good.clone();
        other[0] = 17; // CUPTI_ACTIVITY_KIND_OVERHEAD
        assert_eq!(parse(&other), Ok(None));
        let backwards = Activity { end_ns: 1, ..activity(ActivityKind::Copy) };
        assert!(parse(&record(&backwards, 0, 88)).unwrap_err().contains("ends at 1"));
        let unset = Activity { start_ns: 0, end_ns: 0, ..activity(ActivityKind::Kernel) };
        assert!(parse(&record(&unset, 0, 208)).is_err());
    }
}
