//! Real-time chunking between the wire and the engine: the left-over of a request → the chunk to
//! which the new one is tied; the model's chunk → the array a client cuts its next left-over from.

use pirouette_engine::Answer;
use pirouette_model::rtc::RtcError;
use pirouette_model::{Config, PreviousChunk};
use pirouette_policy::{NdArray, Policy, Prepared, Value};
use pirouette_server::{RtcFields, ServiceError, Space};

/// Key of the chunk in model space, in an answer.
const MODEL_ACTIONS: &str = "model_actions";

/// The previous chunk of a request; `None` when it has none, nothing of it is left, or none of it
/// is to be given.
pub fn previous_chunk(
    model: &Config,
    policy: &Policy,
    prepared: &Prepared,
    fields: &RtcFields,
) -> Result<Option<PreviousChunk>, ServiceError> {
    let Some(left) = fields.left_over.as_ref().filter(|l| l.shape[0] > 0) else {
        return Ok(None);
    };
    let config = policy.config();
    let wrong = |message: String| ServiceError::exception("ValueError", message);
    let (key, [rows, cols]) = (left.space.key(), left.shape);
    let (dims, sizes) = (config.output_dims(), [config.horizon, config.action_dim]);
    // Fewer columns would be drawn towards 0 in the missing ones.
    let padded = left.space == Space::Model && cols == config.action_dim;
    if rows > config.horizon || (cols != dims && !padded) {
        let or = match left.space {
            Space::Model => format!(" or [actions, {}]", config.action_dim),
            Space::Robot => String::new(),
        };
        return Err(wrong(format!(
            "`{key}` has shape [{rows}, {cols}]; it must be [actions, {dims}]{or} with at most {} \
             actions",
            config.horizon
        )));
    }
    let values = match left.space {
        Space::Model => left.values.iter().map(|v| *v as f32).collect(),
        Space::Robot => {
            policy.model_actions(prepared, &left.values).map_err(crate::service::refused)?
        }
    };
    let (settings, trained) = (&fields.settings, model.rtc_max_delay);
    let previous = match (fields.trained, settings.delay) {
        (false, _) => PreviousChunk::new(&values, left.shape, settings, sizes),
        (true, 0) => return Ok(None),
        (true, delay) => PreviousChunk::given(&values, left.shape, delay, trained, sizes),
    };
    previous.map(Some).map_err(|error| {
        let delay = matches!(error, RtcError::Delay { .. });
        wrong(format!("`{}`: {error}", if delay { "inference_delay" } else { key }))
    })
}

/// The chunk before un-normalisation, cut to the robot's columns as LeRobot's left-overs are.
pub fn model_actions(policy: &Policy, answer: &Answer) -> Option<(String, Value)> {
    let dims = policy.config().output_dims().min(answer.action_dim);
    let rows = answer.actions.chunks_exact(answer.action_dim);
    let values: Vec<f32> = rows.flat_map(|row| &row[..dims]).copied().collect();
    let array = NdArray::from_f32(vec![answer.horizon, dims], &values)?;
    Some((MODEL_ACTIONS.into(), Value::Array(array)))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use pirouette_model::rtc::{Schedule, Settings};
    use pirouette_policy::sample_observation;
    use pirouette_server::{GivenNoise, LeftOver, Reply, RequestContext, Service};
    use pirouette_testing::plain::{Observation, Plain};

    use super::*;
    use crate::args::{DeviceArgs, Precision, RopeArgs, WeightArgs};
    use crate::model::{self, ModelPlan};
    use crate::service::PolicyService;
    use crate::setup::PolicyArgs;
    use crate::weights::Weights;

    /// A recorded tiny checkpoint behind the service, on the CPU in f32.
    struct Served {
        service: PolicyService,
        policy: Policy,
        weights: Weights,
        steps: usize,
        runtime: tokio::runtime::Runtime,
    }

    impl Served {
        fn new(name: &str) -> Self {
            let testdata = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
            let checkpoint = testdata.join("A_tiny/e2e").join(name).join("checkpoint");
            let tokenizer = Some(testdata.join("D_preprocess/tokenizer/tok_bpe.model"));
            let (device, steps) = ("cpu".to_string(), 4);
            let plan = ModelPlan {
                name: Some(name.into()),
                rope: RopeArgs::default(),
                policy: PolicyArgs { tokenizer, norm_stats: None, default_prompt: None },
                devices: vec![DeviceArgs { device, precision: Precision::F32, threads: None }],
                max_batch: None,
                queue: 256,
                steps: Some(steps),
                deterministic: false,
                rtc: false,
                window: Duration::ZERO,
                busy_poll: Duration::ZERO,
                isolate: model::Isolate::Never,
                log: crate::log::LogFormat::Text,
            };
            let parts = plan.open(Some(checkpoint.clone())).unwrap();
            let policy = parts.policy.clone();
            let family = policy.config().family;
            let checkpoint = Some(checkpoint);
            let args = WeightArgs::for_family(checkpoint.clone(), family, plan.rope);
            let weights = Weights::open(&args).unwrap();
            let served = model::Served::new(plan, checkpoint, parts.start().unwrap());
            let service = PolicyService::new(served).unwrap();
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(service.warm());
            Served { service, policy, weights, steps, runtime }
        }

        fn infer(&self, seed: u64, rtc: RtcFields) -> Result<Reply, ServiceError> {
            let c = self.policy.config();
            let shape = [c.horizon, c.action_dim];
            let noise = Some(GivenNoise { shape, values: self.noise() });
            let context = RequestContext { noise, rtc, ..RequestContext::new(Instant::now()) };
            self.runtime.block_on(self.service.infer(sample_observation(c, seed), context))
        }

        fn noise(&self) -> Vec<f32> {
            let c = self.policy.config();
            let mut noise = vec![0.0; c.horizon * c.action_dim];
            pirouette_engine::standard_normal(7, &mut noise);
            noise
        }

        /// The robot's actions of the plain form.
        fn plain(&self, seed: u64, previous: Option<&PreviousChunk>) -> Vec<f64> {
            let prepared = self.policy.prepare(&sample_observation(self.policy.config(), seed));
            let prepared = prepared.unwrap();
            let input = &prepared.input;
            let side = self.policy.image_side();
            let image = |i: usize| input.images.get(i).map(|image| image.to_vec());
            let observation = Observation {
                images: [0, 1, 2].map(|i| image(i).unwrap_or(vec![0; side * side * 3])),
                image_masks: [0, 1, 2].map(|i| i < input.images.len()),
                tokens: input.tokens.clone(),
                token_mask: vec![true; input.tokens.len()],
                state: input.state.clone(),
                noise: self.noise(),
            };
            let plain = Plain::new(self.weights.config, self.weights.source());
            let actions = plain.sample_after(&observation, self.steps, previous);
            let actions: Vec<f32> = actions.into_iter().map(|a| a as f32).collect();
            self.policy.finish(&prepared, &actions).unwrap().to_f64().unwrap()
        }
    }

    fn far(a: &[f64], b: &[f64]) -> f64 {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
    }

    fn rows_after(reply: &Reply, executed: usize) -> (LeftOver, LeftOver) {
        let Some((key, Value::Array(model))) = reply.extras.first() else {
            panic!("no model actions in {:?}", reply.extras);
        };
        assert_eq!(
            (key.as_str(), model.shape.clone()),
            (MODEL_ACTIONS, reply.actions.shape.clone())
        );
        let cut = |array: &NdArray, space| {
            let [rows, dims] = array.shape[..] else { panic!("{:?}", array.shape) };
            let values = array.to_f64().unwrap()[executed * dims..].to_vec();
            LeftOver { shape: [rows - executed, dims], values, space }
        };
        (cut(model, Space::Model), cut(&reply.actions, Space::Robot))
    }

    #[test]
    fn the_next_chunk_is_guided_as_in_the_plain_form() {
        for name in ["pi05_droid", "pi0_aloha"] {
            let served = Served::new(name);
            let asking = RtcFields { return_model_actions: true, ..Default::default() };
            let first = served.infer(1, asking).unwrap();
            let actions = |reply: &Reply| reply.actions.to_f64().unwrap();
            let scale = actions(&first).iter().fold(1.0f64, |m, a| m.max(a.abs()));
            let off = far(&actions(&first), &served.plain(1, None));
            assert!(off < 1e-4 * scale, "{name}: the first chunk is off by {off}");

            let (model, robot) = rows_after(&first, 3);
            let settings = Settings { delay: 2, schedule: Schedule::Exp, ..Default::default() };
            let with = |left_over: LeftOver| RtcFields {
                left_over: Some(left_over),
                settings,
                ..Default::default()
            };
            let c = served.policy.config();
            let values: Vec<f32> = model.values.iter().map(|v| *v as f32).collect();
            let sizes = [c.horizon, c.action_dim];
            let previous = PreviousChunk::new(&values, model.shape, &settings, sizes).unwrap();
            let want = served.plain(2, Some(&previous));
            let free = served.plain(2, None);
            let second = served.infer(2, with(model)).unwrap();
            assert!(second.extras.is_empty(), "model actions come only when asked for");
            let off = far(&actions(&second), &want);
            assert!(off < 1e-4 * scale, "{name}: the guided chunk is off by {off}");
            let moved = far(&want, &free);
            assert!(moved > 1e-2 * scale, "{name}: the guidance moved it by {moved} only");

            // The same left-over as the robot has it: relative columns follow the new state, so
            // the first observation gives the chunk that model space gives.
            let again = served.infer(1, with(robot)).unwrap();
            let (model, _) = rows_after(&first, 3);
            let want = served.infer(1, with(model)).unwrap();
            let off = far(&actions(&again), &actions(&want));
            assert!(off < 1e-3 * scale, "{name}: in robot space off by {off}");
        }
    }

    #[test]
    fn left_overs_that_do_not_fit_are_named_and_an_empty_one_is_a_first_chunk() {
        let served = Served::new("pi05_droid");
        let with = |shape: [usize; 2], space| RtcFields {
            left_over: Some(LeftOver { shape, values: vec![0.5; shape[0] * shape[1]], space }),
            ..Default::default()
        };
        for (fields, want) in [
            (with([16, 8], Space::Model), "`prev_chunk_left_over` has shape [16, 8]; it must be"),
            (with([2, 33], Space::Model), "[2, 33]; it must be [actions, 8] or [actions, 32] with"),
            (with([2, 9], Space::Model), "[2, 9]; it must be [actions, 8] or [actions, 32] with"),
            (with([2, 7], Space::Model), "[actions, 32] with at most 15 actions"),
            (with([2, 1], Space::Model), "`prev_chunk_left_over` has shape [2, 1]; it must be"),
            (with([2, 7], Space::Robot), "`prev_chunk_left_over_actions` has shape [2, 7]; it"),
            (with([2, 32], Space::Robot), "[2, 32]; it must be [actions, 8] with at most 15"),
            (with([16, 8], Space::Robot), "`prev_chunk_left_over_actions` has shape [16, 8]; it"),
        ] {
            let error = served.infer(1, fields).unwrap_err();
            assert_eq!(error.python_type, "ValueError");
            assert!(error.message.contains(want), "{}", error.message);
        }
        for whole in [with([15, 8], Space::Model), with([2, 32], Space::Model)] {
            served.infer(1, whole).unwrap();
        }
        let mut untrained = RtcFields { trained: true, ..with([2, 8], Space::Model) };
        untrained.settings.delay = 1;
        let error = served.infer(1, untrained).unwrap_err();
        let want = "`inference_delay`: 1 actions can't be given: the model was trained for 0 at";
        assert!(error.message.starts_with(want), "{error}");
        let empty = served.infer(1, with([0, 8], Space::Model)).unwrap();
        assert_eq!(empty.actions, served.infer(1, RtcFields::default()).unwrap().actions);
    }
}
