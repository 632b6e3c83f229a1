//! The lease that covers what a migration creates.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, DeleteRequest, ListResourcesRequest, Resource,
};
use containerd_client::tonic::transport::Channel;

use super::LABEL;
use super::client::{Containerd, Destination, MAX_MESSAGE, QUICK, SLOW};
use super::error::{Doing, Found, Result};

/// After this the collector takes what a migration left, if nobody else did. Longer than any migration.
const EXPIRY: Duration = Duration::from_secs(24 * 3600);
const GC_EXPIRE: &str = "containerd.io/gc.expire";

impl Destination {
    /// Creates the lease. Before this nothing can be created here. One that is there is fine.
    ///
    /// # Errors
    /// [`super::Error::Call`].
    pub(crate) async fn create_lease(&self) -> Result<()> {
        let labels = [
            (LABEL.to_owned(), self.migration.clone()),
            (GC_EXPIRE.to_owned(), rfc3339(SystemTime::now() + EXPIRY)),
        ];
        let request = CreateRequest { id: self.lease.clone(), labels: labels.into() };
        let answer = self.plain.leases().create(self.plain.request(request, QUICK)).await;
        match answer.doing(|| format!("create lease {}", self.lease)) {
            Err(error) if error.is_already_exists() => Ok(()),
            other => other.map(drop),
        }
    }

    /// Deletes the lease; with `sync` not before everything that nothing else refers to is gone. One that
    /// is not there is fine.
    ///
    /// # Errors
    /// [`super::Error::Call`].
    pub(crate) async fn delete_lease(&self, sync: bool) -> Result<()> {
        let request = DeleteRequest { id: self.lease.clone(), sync };
        let answer = self.plain.leases().delete(self.plain.request(request, SLOW)).await;
        answer.doing(|| format!("delete lease {}", self.lease)).found().map(drop)
    }

    /// Covers something that was here before, so that it stays.
    pub(super) async fn cover(&self, kind: &str, id: &str) -> Result<()> {
        let resource = Some(Resource { id: id.to_owned(), r#type: kind.to_owned() });
        let request = AddResourceRequest { id: self.lease.clone(), resource };
        let answer = self.plain.leases().add_resource(self.plain.request(request, QUICK)).await;
        answer.doing(|| format!("cover {kind} {id} by lease {}", self.lease)).map(drop)
    }

    /// The snapshotters of which the lease covers a snapshot.
    pub(super) async fn covered_snapshotters(&self) -> Result<Vec<String>> {
        let request = ListResourcesRequest { id: self.lease.clone() };
        let answer = self.plain.leases().list_resources(self.plain.request(request, QUICK)).await;
        let answer = answer.doing(|| format!("list what lease {} covers", self.lease)).found()?;
        let resources = answer.map(|a| a.into_inner().resources).unwrap_or_default();
        let of = resources.iter().filter_map(|r| r.r#type.strip_prefix("snapshots/"));
        Ok(of.map(str::to_owned).collect())
    }
}

impl Containerd {
    fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }
}

/// A time as `2026-11-21T03:10:27Z`. Times before 1970 count as 1970.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Days are counted from 1 March of the year 0, so that the leap day is the last of its year; 400
    // years always have 146097 days, and five months from March always have 153.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..10 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_rfc3339() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_795_230_627, "2026-11-21T03:10:27Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
