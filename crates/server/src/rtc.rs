//! The optional keys of real-time chunking (LeRobot's names): taken out of a request, checked.

use pirouette_model::rtc::{Schedule, Settings};
use pirouette_policy::Value;

use crate::fields::{boolean, integer, matrix, number, text};

/// Most rows of a chunk, which delays and horizons count: the model's own limit.
const MAX_ROWS: i128 = 1024;

/// What is left of the chunk in execution, and how a new one is to be tied to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RtcFields {
    /// `prev_chunk_left_over` or `prev_chunk_left_over_actions`; absent for the first chunk.
    pub left_over: Option<LeftOver>,
    /// `inference_delay`, `execution_horizon`, `prefix_attention_schedule`,
    /// `max_guidance_weight`.
    pub settings: Settings,
    /// `rtc_mode`: guided (the default), or the first `inference_delay` actions given.
    pub trained: bool,
    /// `return_model_actions`: whether the answer brings the chunk in model space, too.
    pub return_model_actions: bool,
}

/// Actions that were not yet executed.
#[derive(Clone, Debug, PartialEq)]
pub struct LeftOver {
    /// Rows and columns as the client claims; the service checks them.
    pub shape: [usize; 2],
    /// Row-major values, all finite.
    pub values: Vec<f64>,
    /// What they are.
    pub space: Space,
}

/// The units of a left-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// `prev_chunk_left_over`: the model's, normalised, as LeRobot sends them.
    Model,
    /// `prev_chunk_left_over_actions`: the robot's, as this server answers them.
    Robot,
}

impl Space {
    /// The key of a request.
    pub fn key(self) -> &'static str {
        match self {
            Space::Model => "prev_chunk_left_over",
            Space::Robot => "prev_chunk_left_over_actions",
        }
    }
}

impl RtcFields {
    /// Takes one key; `None` if it is not one of these, else what its value must be if it isn't.
    pub(crate) fn take(&mut self, key: &str, value: &Value) -> Option<Result<(), String>> {
        if !pirouette_policy::reserved::RTC.contains(&key) {
            return None;
        }
        if *value == Value::Nil {
            return Some(Ok(()));
        }
        Some(self.set(key, value))
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), String> {
        let settings = &mut self.settings;
        match key {
            "inference_delay" => settings.delay = integer(value, MAX_ROWS)? as usize,
            "execution_horizon" => settings.execution_horizon = integer(value, MAX_ROWS)? as usize,
            "prefix_attention_schedule" => settings.schedule = schedule(value)?,
            "max_guidance_weight" => settings.limit = limit(value)?,
            "rtc_mode" => self.trained = trained(value)?,
            "return_model_actions" => self.return_model_actions = boolean(value)?,
            _ => {
                if is_empty(value) {
                    return Ok(());
                }
                let robot = key == Space::Robot.key();
                let space = if robot { Space::Robot } else { Space::Model };
                if self.left_over.as_ref().is_some_and(|l| l.space != space) {
                    return Err("sent in model space or in the robot's, not in both".into());
                }
                self.left_over = Some(left_over(value, space)?);
            }
        }
        Ok(())
    }
}

fn trained(value: &Value) -> Result<bool, String> {
    match text(value) {
        Some(mode) if mode.eq_ignore_ascii_case("guided") => Ok(false),
        Some(mode) if mode.eq_ignore_ascii_case("trained") => Ok(true),
        _ => Err("\"guided\" or \"trained\"".into()),
    }
}

fn schedule(value: &Value) -> Result<Schedule, String> {
    text(value).and_then(|name| Schedule::named(&name)).ok_or_else(|| {
        let names = Schedule::ALL.map(|s| format!("\"{}\"", s.name()));
        format!("one of {}", names.join(", "))
    })
}

fn limit(value: &Value) -> Result<f32, String> {
    let limit = match number(value) {
        Some(Value::Int(n)) => n as f64,
        Some(Value::Float(v)) => v,
        _ => f64::NAN,
    };
    // Not through f32: what is just above the limit must not round down to it.
    if (0.0..=1000.0).contains(&limit) {
        Ok(limit as f32)
    } else {
        Err("a number from 0 to 1000".into())
    }
}

/// Nothing is left of the last chunk, however that is written: `[]`, or an array without elements.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::List(items) => items.is_empty(),
        Value::Array(array) => array.shape.contains(&0),
        _ => false,
    }
}

fn left_over(value: &Value, space: Space) -> Result<LeftOver, String> {
    let want = || format!("an array of floats [1 to {MAX_ROWS} actions, dims], all finite");
    let Value::Array(array) = value else { return Err(want()) };
    let few = |m: &([usize; 2], Vec<f64>)| m.0[0] as i128 <= MAX_ROWS;
    let (shape, values) = matrix(array).filter(few).ok_or_else(want)?;
    Ok(LeftOver { shape, values, space })
}

#[cfg(test)]
mod tests {
    use pirouette_policy::{NdArray, Scalar};

    use super::*;

    fn take(key: &str, value: Value) -> Result<RtcFields, String> {
        let mut fields = RtcFields::default();
        fields.take(key, &value).unwrap_or_else(|| panic!("{key} is not known"))?;
        Ok(fields)
    }

    fn rows(rows: usize, value: f64) -> Value {
        Value::Array(NdArray::from_f64(vec![rows, 3], &vec![value; rows * 3]).unwrap())
    }

    #[test]
    fn every_key_is_read() {
        assert_eq!(RtcFields::default().take("state", &Value::Nil), None);
        let l = take("prev_chunk_left_over", rows(2, 0.5)).unwrap().left_over.unwrap();
        assert_eq!((l.shape, l.values, l.space), ([2, 3], vec![0.5; 6], Space::Model));
        let l = take("prev_chunk_left_over_actions", rows(1, 9.0)).unwrap().left_over.unwrap();
        assert_eq!((l.shape, l.space), ([1, 3], Space::Robot));
        let flat = Value::Array(NdArray::from_f64(vec![0], &[]).unwrap());
        for empty in [rows(0, 0.0), flat, Value::List(vec![])] {
            let read = take("prev_chunk_left_over", empty);
            assert_eq!(read, Ok(RtcFields::default()), "nothing is left: a first chunk");
        }
        assert_eq!(take("inference_delay", Value::Int(4)).unwrap().settings.delay, 4);
        let numpy = Value::Scalar(Scalar::I64, Box::new(Value::Int(8)));
        assert_eq!(take("execution_horizon", numpy).unwrap().settings.execution_horizon, 8);
        let exp = take("prefix_attention_schedule", Value::Str("EXP".into())).unwrap();
        assert_eq!(exp.settings.schedule, Schedule::Exp);
        let limit = take("max_guidance_weight", Value::Float(2.5)).unwrap().settings.limit;
        assert_eq!(limit, 2.5);
        assert!(take("rtc_mode", Value::Str("trained".into())).unwrap().trained);
        assert!(take("return_model_actions", Value::Bool(true)).unwrap().return_model_actions);
        assert_eq!(take("inference_delay", Value::Nil), Ok(RtcFields::default()));
    }

    #[test]
    fn numpys_values_are_read_as_pythons() {
        let zero_d = |dtype, data: &[u8]| {
            Value::Array(NdArray { dtype, shape: vec![], data: data.to_vec().into() })
        };
        let text = |text: &str| {
            let points: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
            zero_d(Scalar::Unicode(text.len()), &points)
        };
        let numpy = Value::Scalar(Scalar::Bool, Box::new(Value::Bool(true)));
        for yes in [numpy, zero_d(Scalar::Bool, &[1])] {
            assert!(take("return_model_actions", yes).unwrap().return_model_actions);
        }
        let exp = take("prefix_attention_schedule", text("exp")).unwrap();
        assert_eq!(exp.settings.schedule, Schedule::Exp);
        assert!(take("rtc_mode", text("trained")).unwrap().trained);
        assert!(!take("rtc_mode", text("guided")).unwrap().trained);
        let delay = zero_d(Scalar::I16, &3i16.to_le_bytes());
        assert_eq!(take("inference_delay", delay).unwrap().settings.delay, 3);
        let data = 0x3800u16.to_le_bytes().repeat(6).into();
        let half = Value::Array(NdArray { dtype: Scalar::F16, shape: vec![2, 3], data });
        let left = take("prev_chunk_left_over", half).unwrap().left_over.unwrap();
        assert_eq!((left.shape, left.values), ([2, 3], vec![0.5; 6]));
    }

    #[test]
    fn wrong_values_are_refused_with_what_is_wanted() {
        let text = Value::Str("1".into());
        for (key, value, want) in [
            ("prev_chunk_left_over", rows(2, f64::NAN), "all finite"),
            ("prev_chunk_left_over", Value::List(vec![Value::Int(1)]), "array"),
            ("prev_chunk_left_over", rows(1025, 0.0), "1 to 1024 actions"),
            ("inference_delay", Value::Int(-1), "from 0 to 1024"),
            ("inference_delay", Value::Float(1.5), "integer"),
            ("execution_horizon", Value::Int(1025), "from 0 to 1024"),
            ("prefix_attention_schedule", text.clone(), "\"linear\", \"exp\""),
            ("max_guidance_weight", Value::Float(f64::INFINITY), "from 0 to 1000"),
            ("max_guidance_weight", Value::Int(-1), "from 0 to 1000"),
            ("rtc_mode", Value::Bool(true), "\"guided\" or \"trained\""),
            ("return_model_actions", Value::Int(1), "true or false"),
        ] {
            let error = take(key, value).expect_err(key);
            assert!(error.contains(want), "{key}: {error}");
        }
        let mut both = RtcFields::default();
        both.take("prev_chunk_left_over", &rows(1, 0.0)).unwrap().unwrap();
        let second = both.take("prev_chunk_left_over_actions", &rows(1, 0.0)).unwrap();
        assert!(second.unwrap_err().contains("not in both"));
    }
}
