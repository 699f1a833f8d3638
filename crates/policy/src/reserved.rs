//! Keys of a request that are the server's: they never reach a policy, so no robot may use them.

/// The optional keys of every request.
pub const REQUEST: [&str; 7] =
    ["seed", "noise", "deadline_ms", "num_steps", "explain", "newest_wins", "session"];

/// The optional keys of real-time chunking.
pub const RTC: [&str; 8] = [
    "prev_chunk_left_over",
    "prev_chunk_left_over_actions",
    "inference_delay",
    "execution_horizon",
    "prefix_attention_schedule",
    "max_guidance_weight",
    "rtc_mode",
    "return_model_actions",
];

/// Keys that make a message something else than one observation.
pub const MESSAGE: [&str; 2] = ["batch", "endpoint"];

/// Whether a key is the server's.
pub fn is(key: &str) -> bool {
    REQUEST.iter().chain(&RTC).chain(&MESSAGE).any(|reserved| *reserved == key)
}
