//! openpi's frames: a map → one observation, a batch of them or a reset; replies → maps.

use std::time::Instant;

use pirouette_policy::{Value, reserved};

use crate::fields;
use crate::service::{Reply, RequestContext, ServiceError};

/// One observation with what came beside it, or what is wrong with it.
pub(crate) type Asked = Result<(Value, RequestContext), ServiceError>;

/// What a frame asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// One observation.
    Infer(Box<(Value, RequestContext)>),
    /// The key `batch`: several, each answered on its own.
    Batch(Vec<Asked>),
    /// RoboArena's `endpoint: "reset"`.
    Reset,
}

/// Optional keys of an observation that no other can share.
const OWN_KEYS: [&str; 3] = ["noise", "prev_chunk_left_over", "prev_chunk_left_over_actions"];

/// RoboArena counts external cameras from 0 or from 1; DROID's policies read the one called 1.
const CAMERA_0: &str = "observation/exterior_image_0_left";
const CAMERA_1: &str = "observation/exterior_image_1_left";

/// Reads a request. `endpoints`: whether RoboArena's `endpoint` is known here; openpi ignores it.
pub(crate) fn read(
    mut map: Vec<(String, Value)>,
    received: Instant,
    most: usize,
    endpoints: bool,
) -> Result<Request, ServiceError> {
    if endpoints {
        if endpoint(&mut map)? {
            return Ok(Request::Reset);
        }
        camera_1(&mut map);
    }
    // nil counts as absent, as it does for the keys that `fields` reads.
    map.retain(|(key, value)| {
        *value != Value::Nil || (key != "batch" && !OWN_KEYS.contains(&&**key))
    });
    let Some(at) = map.iter().position(|(key, _)| key == "batch") else {
        let context = fields::take(&mut map, received)?;
        return Ok(Request::Infer(Box::new((Value::Map(map), context))));
    };
    let Value::List(observations) = map.remove(at).1 else {
        return Err(wrong("`batch` must be a list of observations".into()));
    };
    if !(1..=most).contains(&observations.len()) {
        let n = observations.len();
        return Err(wrong(format!("`batch` holds {n} observations: 1 to {most} are accepted")));
    }
    if let Some((key, _)) = map.iter().find(|(key, _)| OWN_KEYS.contains(&&**key)) {
        return Err(wrong(format!("`{key}` belongs into each observation of `batch`")));
    }
    // Whatever else stands there is ignored, as openpi ignores keys it doesn't know.
    map.retain(|(key, _)| reserved::REQUEST.iter().chain(&reserved::RTC).any(|known| known == key));
    // What is wrong with a shared key is wrong with the whole frame.
    fields::take(&mut map.clone(), received)?;
    let each = |(i, mut observation)| {
        if let (true, Value::Map(own)) = (endpoints, &mut observation) {
            camera_1(own);
        }
        one_of_batch(i, observation, &map, received)
    };
    Ok(Request::Batch(observations.into_iter().enumerate().map(each).collect()))
}

fn one_of_batch(
    index: usize,
    observation: Value,
    shared: &[(String, Value)],
    received: Instant,
) -> Asked {
    let Value::Map(mut own) = observation else {
        let message = format!("observation {index} of the batch must be a map");
        return Err(ServiceError::exception("TypeError", message));
    };
    let misplaced = |(key, value): &&(String, Value)| {
        ["newest_wins", "session"].contains(&&**key) && *value != Value::Nil
    };
    if let Some((key, _)) = own.iter().find(misplaced) {
        return Err(wrong(format!("`{key}` belongs beside `batch`, not into an observation")));
    }
    for (key, value) in shared {
        // A seed is of the noise: who brings that has none drawn.
        let instead = |known: &str| known == key || (known == "noise" && key == "seed");
        if !own.iter().any(|(known, value)| instead(known) && *value != Value::Nil) {
            own.push((key.clone(), value.clone()));
        }
    }
    let context = fields::take(&mut own, received)?;
    Ok((Value::Map(own), context))
}

/// Calls the external camera 1 where there is none of that name.
fn camera_1(observation: &mut [(String, Value)]) {
    if !observation.iter().any(|(key, _)| key == CAMERA_1)
        && let Some((key, _)) = observation.iter_mut().find(|(key, _)| key == CAMERA_0)
    {
        *key = CAMERA_1.into();
    }
}

/// Takes `endpoint` out; whether it is a reset.
fn endpoint(map: &mut Vec<(String, Value)>) -> Result<bool, ServiceError> {
    let Some(at) = map.iter().position(|(key, _)| key == "endpoint") else { return Ok(false) };
    match map.remove(at).1 {
        Value::Nil => Ok(false),
        Value::Str(name) if name == "infer" => Ok(false),
        Value::Str(name) if name == "reset" => Ok(true),
        _ => Err(wrong("`endpoint` must be \"infer\" or \"reset\"".into())),
    }
}

fn wrong(message: String) -> ServiceError {
    ServiceError::exception("ValueError", message)
}

impl Request {
    /// The contexts of what is asked.
    pub(crate) fn contexts(&mut self) -> Vec<&mut RequestContext> {
        match self {
            Request::Infer(asked) => vec![&mut asked.1],
            Request::Batch(asked) => asked.iter_mut().flatten().map(|(_, c)| c).collect(),
            Request::Reset => Vec::new(),
        }
    }
}

/// openpi's keys in openpi's order, then ours.
pub(crate) fn response(reply: Reply, infer_ms: f64, previous_ms: Option<f64>) -> Value {
    let mut map = result(reply);
    map.insert(2, server_timing(infer_ms, previous_ms));
    Value::Map(map)
}

/// One result for each observation, in their order.
pub(crate) fn batch_response(
    results: Vec<Result<Reply, ServiceError>>,
    infer_ms: f64,
    previous_ms: Option<f64>,
) -> Value {
    let one = |result: Result<Reply, ServiceError>| match result {
        Ok(reply) => Value::Map(self::result(reply)),
        Err(error) => {
            let mut map = vec![("error".to_string(), Value::Str(error.line()))];
            map.extend(error.detail.map(|detail| ("detail".into(), Value::Str(detail))));
            Value::Map(map)
        }
    };
    let results = results.into_iter().map(one).collect();
    let batch = ("batch".to_string(), Value::List(results));
    Value::Map(vec![batch, server_timing(infer_ms, previous_ms)])
}

fn result(reply: Reply) -> Vec<(String, Value)> {
    let model = vec![("infer_ms".to_string(), Value::Float(reply.model_ms))];
    let mut map = vec![
        ("actions".to_string(), Value::Array(reply.actions)),
        ("policy_timing".into(), Value::Map(model)),
    ];
    map.extend(reply.extras);
    map
}

fn server_timing(infer_ms: f64, previous_ms: Option<f64>) -> (String, Value) {
    let mut timing = vec![("infer_ms".to_string(), Value::Float(infer_ms))];
    timing.extend(previous_ms.map(|ms| ("prev_total_ms".to_string(), Value::Float(ms))));
    ("server_timing".into(), Value::Map(timing))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: Value) -> (String, Value) {
        (key.into(), value)
    }

    fn text(value: &str) -> Value {
        Value::Str(value.into())
    }

    fn read_one(map: Vec<(String, Value)>, endpoints: bool) -> Result<Request, ServiceError> {
        read(map, Instant::now(), 3, endpoints)
    }

    #[test]
    fn shared_keys_reach_every_observation_and_its_own_come_first() {
        let own = Value::Map(vec![entry("x", Value::Nil), entry("seed", Value::Int(5))]);
        let other = Value::Map(vec![entry("y", Value::Nil), entry("noise", Value::Int(5))]);
        let third = Value::Map(vec![entry("session", text("a"))]);
        let request = read_one(
            vec![
                entry("seed", Value::Int(9)),
                entry("newest_wins", Value::Bool(true)),
                entry("unknown", Value::Int(1)),
                entry("batch", Value::List(vec![own, other, third])),
            ],
            false,
        );
        let Request::Batch(asked) = request.unwrap() else { panic!("a batch") };
        let (observation, context) = asked[0].as_ref().unwrap();
        assert_eq!(*observation, Value::Map(vec![entry("x", Value::Nil)]));
        assert_eq!((context.seed, context.newest_wins), (Some(5), true));
        assert!(asked[1].as_ref().unwrap_err().message.starts_with("`noise` must be"));
        assert!(asked[2].as_ref().unwrap_err().message.contains("beside `batch`"));
    }

    #[test]
    fn keys_of_real_time_chunking_beside_a_batch_count_as_inside() {
        let keys = [
            entry("inference_delay", Value::Int(3)),
            entry("execution_horizon", Value::Int(7)),
            entry("prefix_attention_schedule", text("exp")),
            entry("max_guidance_weight", Value::Float(2.5)),
            entry("rtc_mode", text("trained")),
            entry("return_model_actions", Value::Bool(true)),
        ];
        let asked = |own: &[(String, Value)], beside: &[(String, Value)]| {
            let batch = entry("batch", Value::List(vec![Value::Map(own.to_vec())]));
            let map = beside.iter().cloned().chain([batch]).collect();
            let Request::Batch(mut asked) = read_one(map, false).unwrap() else { panic!("batch") };
            let (observation, context) = asked.remove(0).unwrap();
            assert_eq!(observation, Value::Map(vec![]));
            context.rtc
        };
        assert_eq!(asked(&[], &keys), asked(&keys, &[]));
        assert_eq!(asked(&[], &keys).settings.delay, 3);
        let other = [entry("inference_delay", Value::Int(1))];
        assert_eq!(asked(&other, &keys).settings.delay, 1, "its own comes first");
    }

    #[test]
    fn an_observation_with_noise_needs_no_shared_seed() {
        let noise = Value::Array(pirouette_policy::NdArray::from_f64(vec![1, 1], &[0.5]).unwrap());
        let own = |noise| Value::Map(vec![entry("noise", noise)]);
        let both = vec![
            entry("seed", Value::Int(9)),
            entry("batch", Value::List(vec![own(noise), own(Value::Nil)])),
        ];
        let Request::Batch(asked) = read_one(both, false).unwrap() else { panic!("a batch") };
        let contexts: Vec<_> = asked.iter().map(|asked| &asked.as_ref().unwrap().1).collect();
        assert_eq!((contexts[0].seed, contexts[0].noise.is_some()), (None, true));
        assert_eq!((contexts[1].seed, contexts[1].noise.is_some()), (Some(9), false));
    }

    #[test]
    fn nil_counts_as_absent() {
        let nil = |key| entry(key, Value::Nil);
        let alone = vec![entry("state", Value::Int(1)), nil("batch"), nil("noise"), nil("seed")];
        assert_eq!(observation(alone, false), [entry("state", Value::Int(1))]);
        assert_eq!(observation(vec![nil("endpoint")], true), []);
        let own = Value::Map(vec![nil("seed"), nil("session"), nil("newest_wins")]);
        let batch = vec![
            entry("batch", Value::List(vec![own])),
            nil("noise"),
            nil("prev_chunk_left_over"),
            nil("session"),
            entry("seed", Value::Int(9)),
        ];
        let Request::Batch(asked) = read_one(batch, false).unwrap() else { panic!("a batch") };
        assert_eq!(asked[0].as_ref().unwrap().1.seed, Some(9));
    }

    #[test]
    fn wrong_batches_are_refused_as_a_whole() {
        let empty = || Value::Map(vec![]);
        for (batch, beside, want) in [
            (Value::Int(1), None, "`batch` must be a list"),
            (Value::List(vec![]), None, "`batch` holds 0 observations: 1 to 3"),
            (Value::List(vec![empty(); 4]), None, "`batch` holds 4 observations"),
            (Value::List(vec![empty()]), Some(("seed", Value::Int(-1))), "`seed` must be"),
            (
                Value::List(vec![empty()]),
                Some(("rtc_mode", Value::Int(1))),
                "`rtc_mode` must be \"guided\"",
            ),
            (Value::List(vec![empty()]), Some(("noise", Value::Int(1))), "`noise` belongs into"),
            (
                Value::List(vec![empty()]),
                Some(("prev_chunk_left_over", Value::Int(1))),
                "`prev_chunk_left_over` belongs into",
            ),
            (
                Value::List(vec![empty()]),
                Some(("prev_chunk_left_over_actions", Value::Int(1))),
                "`prev_chunk_left_over_actions` belongs into",
            ),
        ] {
            let map = [entry("batch", batch)].into_iter();
            let map = map.chain(beside.map(|(key, value)| entry(key, value))).collect();
            let error = read_one(map, false).unwrap_err();
            assert!(error.message.starts_with(want), "{error}");
        }
        let list = Value::List(vec![Value::Int(1)]);
        let Request::Batch(asked) = read_one(vec![entry("batch", list)], false).unwrap() else {
            panic!("a batch")
        };
        assert_eq!(asked[0].as_ref().unwrap_err().python_type, "TypeError");
    }

    fn observation(map: Vec<(String, Value)>, endpoints: bool) -> Vec<(String, Value)> {
        match read_one(map, endpoints) {
            Ok(Request::Infer(asked)) => match asked.0 {
                Value::Map(map) => map,
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn endpoints_are_known_to_roboarena_alone() {
        let reset = || vec![entry("endpoint", text("reset")), entry("session_id", text("s"))];
        assert!(matches!(read_one(reset(), true), Ok(Request::Reset)));
        assert_eq!(observation(reset(), false), reset(), "openpi ignores it");
        let infer = vec![entry("endpoint", text("infer")), entry(CAMERA_0, Value::Nil)];
        assert_eq!(observation(infer, true), [entry(CAMERA_1, Value::Nil)]);
        for (endpoints, want) in [(true, CAMERA_1), (false, CAMERA_0)] {
            let own = Value::Map(vec![entry(CAMERA_0, Value::Int(1))]);
            let batch = vec![entry("batch", Value::List(vec![own]))];
            let Request::Batch(asked) = read_one(batch, endpoints).unwrap() else {
                panic!("a batch")
            };
            let read = &asked[0].as_ref().unwrap().0;
            assert_eq!(*read, Value::Map(vec![entry(want, Value::Int(1))]));
        }
        let both = vec![entry(CAMERA_0, Value::Int(0)), entry(CAMERA_1, Value::Int(1))];
        assert_eq!(observation(both.clone(), true), both);
        let error = read_one(vec![entry("endpoint", text("stop"))], true).unwrap_err();
        assert!(error.message.contains("`endpoint` must be"), "{error}");
    }
}
