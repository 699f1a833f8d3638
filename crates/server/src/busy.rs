//! Websockets → a thread of their own that stays awake for their next frame.
//!
//! A core that slept takes 50 to 100 µs to wake, and has other people's data in its caches then.
//! Where there are cores to spare, this thread asks the kernel again and again instead of sleeping,
//! from each request to its answer and for [`ServeOptions::busy_poll`] after that; with nobody
//! asking it sleeps like any other. It costs one core whatever the number of its connections,
//! which is bounded because they share it. Only plain TCP comes here.
//!
//! [`ServeOptions::busy_poll`]: crate::ServeOptions::busy_poll

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Connections of the thread; others are served as without it.
pub(crate) const PLACES: usize = 16;

/// What the thread and its connections share.
#[derive(Debug)]
struct Awake {
    /// After each answer.
    patience: Duration,
    began: Instant,
    /// Requests that are being answered.
    running: AtomicU64,
    /// Until when it stays awake if there are none, in microseconds after `began`.
    until_us: AtomicU64,
    /// Looks at the sockets that nothing had asked for.
    looks: AtomicU64,
    heard: Notify,
    over: AtomicBool,
}

impl Awake {
    fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    async fn watch(&self) {
        while !self.over.load(Relaxed) {
            if self.running.load(Relaxed) > 0 || self.now_us() < self.until_us.load(Relaxed) {
                self.looks.fetch_add(1, Relaxed);
                // Whoever else wants the core goes first.
                std::thread::yield_now();
                // The runtime looks at its sockets, without waiting for any.
                tokio::task::yield_now().await;
            } else {
                self.heard.notified().await;
            }
        }
    }
}

/// The thread. Dropping it ends it, and with it the connections that are still there.
#[derive(Debug)]
pub(crate) struct BusyThread(Arc<Awake>);

impl Drop for BusyThread {
    fn drop(&mut self) {
        self.0.over.store(true, Relaxed);
        self.0.heard.notify_one();
    }
}

/// The places on the thread.
#[derive(Debug)]
pub(crate) struct Places {
    runtime: Handle,
    free: Arc<Semaphore>,
    awake: Arc<Awake>,
}

/// One connection's place.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) runtime: Handle,
    awake: Arc<Awake>,
    _taken: OwnedSemaphorePermit,
}

/// Starts the thread; it stays awake while requests are answered and for `patience` after that.
pub(crate) fn start(patience: Duration) -> io::Result<(BusyThread, Places)> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let awake = Arc::new(Awake {
        patience,
        began: Instant::now(),
        running: AtomicU64::new(0),
        until_us: AtomicU64::new(0),
        looks: AtomicU64::new(0),
        heard: Notify::new(),
        over: AtomicBool::new(false),
    });
    let watched = awake.clone();
    std::thread::Builder::new().name("busy-sockets".into()).spawn(move || {
        runtime.block_on(watched.watch());
        runtime.shutdown_background();
    })?;
    let free = Arc::new(Semaphore::new(PLACES));
    Ok((BusyThread(awake.clone()), Places { runtime: handle, free, awake }))
}

impl Places {
    /// A place, if one is free.
    pub(crate) fn take(&self) -> Option<Place> {
        let taken = self.free.clone().try_acquire_owned().ok()?;
        Some(Place { runtime: self.runtime.clone(), awake: self.awake.clone(), _taken: taken })
    }

    /// Connections that have one.
    pub(crate) fn taken(&self) -> usize {
        PLACES.saturating_sub(self.free.available_permits())
    }

    /// Looks at the sockets so far that nothing had asked for.
    pub(crate) fn looks(&self) -> u64 {
        self.awake.looks.load(Relaxed)
    }
}

impl Place {
    /// A request is being answered, until what is returned is dropped: the thread is awake
    /// meanwhile, and then for the next.
    pub(crate) fn busy(&self) -> Busy {
        self.awake.running.fetch_add(1, Relaxed);
        self.awake.heard.notify_one();
        Busy(self.awake.clone())
    }
}

/// Keeps the thread awake.
#[derive(Debug)]
pub(crate) struct Busy(Arc<Awake>);

impl Drop for Busy {
    fn drop(&mut self) {
        let patience = self.0.patience.as_micros() as u64;
        self.0.until_us.store(self.0.now_us().saturating_add(patience), Relaxed);
        self.0.running.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks that were made, once there were none for a while.
    fn settled(places: &Places) -> u64 {
        let mut before = places.looks();
        for _ in 0..500 {
            std::thread::sleep(Duration::from_millis(40));
            if places.looks() == before {
                return before;
            }
            before = places.looks();
        }
        panic!("it never slept: {before} looks");
    }

    #[test]
    fn it_is_awake_after_a_request_and_sleeps_when_nobody_asks() {
        let (thread, places) = start(Duration::from_millis(20)).unwrap();
        assert_eq!(settled(&places), 0, "nobody has asked yet");
        let place = places.take().unwrap();
        let mut looks = 0;
        for _ in 0..3 {
            // On a machine that is busy the thread may not get a core while it is to be awake.
            let after = (0..50).map(|_| {
                drop(place.busy());
                settled(&places)
            });
            looks = after.into_iter().find(|after| *after > looks).expect("it never was awake");
        }
        let busy = place.busy();
        let many = (0..20_000).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            places.looks() >= looks + 1000
        });
        assert!(many, "asleep while a request is answered");
        drop(busy);
        looks = settled(&places);
        drop(thread);
        assert_eq!(settled(&places), looks);
    }

    #[test]
    fn places_are_bounded_and_come_back() {
        let (_thread, places) = start(Duration::ZERO).unwrap();
        let mut held: Vec<Place> = (0..PLACES).map(|_| places.take().unwrap()).collect();
        assert!(places.take().is_none());
        held.pop();
        assert_eq!(places.taken(), PLACES - 1);
        assert!(places.take().is_some());
    }
}
