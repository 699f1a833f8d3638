//! `pirouette serve` on null devices in a process of its own, looked at from outside.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pirouette_engine::NullTimes;
use pirouette_policy::Value;
use pirouette_server::load::socket::{Address, get};
use pirouette_server::load::{LoadOptions, observation_of};

use super::port::Port;

/// Three cameras, eight numbers, ten actions: what the measured times are of.
const ROBOT: &str = r#"
name = "stress"
family = "pi0"
horizon = 10
norm = "identity"
[robot]
kind = "generic"
output_dims = 7
[[robot.cameras]]
key = "observation/image"
slot = "base_0_rgb"
layout = "hwc"
[[robot.cameras]]
key = "observation/left"
slot = "left_wrist_0_rgb"
layout = "hwc"
[[robot.cameras]]
key = "observation/right"
slot = "right_wrist_0_rgb"
layout = "hwc"
[[robot.state]]
key = "observation/state"
dims = 8
"#;

/// Time a server may take to start, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server. Dropping it kills it.
pub struct Server {
    child: Child,
    port: Port,
    admin: Port,
    config: PathBuf,
}

impl Server {
    /// Starts one with batches up to `max_batch` and waits until it is ready.
    pub async fn start(times: &NullTimes, max_batch: usize, flags: &[&str]) -> Result<Server> {
        let table: Vec<String> = times.0.iter().map(|(b, ms)| format!("{b}:{ms}")).collect();
        let (port, admin) = (Port::free()?, Port::free()?);
        let name = format!("pirouette-stress-{}-{}.toml", std::process::id(), port.number);
        let config = std::env::temp_dir().join(name);
        std::fs::write(&config, ROBOT)?;
        let child = Command::new(std::env::current_exe()?)
            .arg("serve")
            .arg(&config)
            .args(["--device", &format!("null:{}", table.join(","))])
            .args(["--max-batch", &max_batch.to_string()])
            .args(["--port", &port.number.to_string()])
            .args(["--admin-port", &admin.number.to_string()])
            .args(flags)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .env("PIROUETTE_LOG", "error")
            .spawn()
            .context("can't start `pirouette serve`")?;
        let mut server = Server { child, port, admin, config };
        let began = Instant::now();
        while server.page("/readyz").await.is_err() {
            if server.child.try_wait()?.is_some() || began.elapsed() > PATIENCE {
                let mut said = String::new();
                let _ = server.child.kill();
                if let Some(mut stderr) = server.child.stderr.take() {
                    stderr.read_to_string(&mut said)?;
                }
                bail!("the server did not get ready: {said}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(server)
    }

    /// `ws://…`
    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}", self.port.number)
    }

    /// For raw sockets.
    pub fn address(&self) -> Result<Address> {
        Address::parse(&self.url()).map_err(|e| anyhow::anyhow!(e))
    }

    /// A page of the admin listener.
    pub async fn page(&self, path: &str) -> Result<String> {
        let admin = Address::parse(&format!("ws://127.0.0.1:{}", self.admin.number));
        let admin = admin.map_err(|e| anyhow::anyhow!(e))?;
        Ok(get(&admin, path, None).await?)
    }

    /// `host:port` of the admin listener.
    pub fn admin(&self) -> String {
        format!("127.0.0.1:{}", self.admin.number)
    }

    /// A sample of `/metrics`, summed over its labels.
    pub async fn metric(&self, name: &str) -> Result<f64> {
        let text = self.page("/metrics").await?;
        let value = |line: &str| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with(['{', ' ']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        };
        let values: Vec<f64> = text.lines().filter_map(value).collect();
        if values.is_empty() {
            bail!("/metrics has no {name}");
        }
        Ok(values.iter().sum())
    }

    /// What its contract asks for, with images of `side` pixels.
    pub async fn observation(&self, side: usize) -> Result<Value> {
        Ok(observation_of(&self.page("/contract").await?, side, None)?)
    }

    /// Full-size requests from `clients` clients, closed loop, for `seconds`.
    pub async fn load(&self, clients: usize, seconds: f64) -> Result<LoadOptions> {
        Ok(LoadOptions {
            url: self.url(),
            api_key: None,
            clients,
            requests: usize::MAX,
            duration: Some(Duration::from_secs_f64(seconds)),
            warm_up: 2,
            rate: None,
            deadline: None,
            observation: self.observation(224).await?,
            timeout: Duration::from_secs(30),
        })
    }

    /// Resident memory.
    pub fn memory_bytes(&self) -> Result<u64> {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.context("no VmRSS")? * 1024)
    }

    /// Open file descriptors.
    pub fn descriptors(&self) -> Result<u64> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))?.count() as u64)
    }

    /// SIGTERM; whether it drained and ended well in time.
    pub async fn stop(mut self) -> Result<bool> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.success());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(false)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already; nothing else can be done about it here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.config);
    }
}
