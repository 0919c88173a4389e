BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL,
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0004');
CREATE TABLE events (
	event_id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
	kind TEXT NOT NULL,
	at_s FLOAT NOT NULL,
	wrapper_id TEXT,
	request_id TEXT,
	measurement_id BIGINT,
	cause_id TEXT,
	detail TEXT NOT NULL
);
INSERT INTO "events" VALUES(1,'LeaseBound',1760000065.0,'10.0.0.1-0',NULL,NULL,NULL,'{"epoch": 7}');
INSERT INTO "events" VALUES(2,'LeaseUsed',1760000070.0,NULL,'77777777777777777777777777777777',NULL,NULL,'{}');
CREATE TABLE forgotten_requests (
	request_id TEXT NOT NULL,
	CONSTRAINT pk_forgotten_requests PRIMARY KEY (request_id)
);
INSERT INTO "forgotten_requests" VALUES('00000000000000000000000000000000');
CREATE TABLE idempotency_keys (
	tenant TEXT NOT NULL,
	"key" TEXT NOT NULL,
	body_sha256 TEXT NOT NULL,
	request_ids TEXT NOT NULL,
	created_s FLOAT NOT NULL,
	CONSTRAINT pk_idempotency_keys PRIMARY KEY (tenant, "key")
);
INSERT INTO "idempotency_keys" VALUES('team-a','key-1','abababababababababababababababababababababababababababababababab','["77777777777777777777777777777777", "99999999999999999999999999999999"]',1760000010.0);
CREATE TABLE leases (
	request_id TEXT NOT NULL,
	wrapper_id TEXT NOT NULL,
	token TEXT NOT NULL,
	granted_s FLOAT NOT NULL,
	deadline_s FLOAT NOT NULL,
	idle_limit_s FLOAT NOT NULL,
	last_active_s FLOAT NOT NULL,
	CONSTRAINT pk_leases PRIMARY KEY (request_id),
	CONSTRAINT fk_leases_request_id_requests FOREIGN KEY(request_id) REFERENCES requests (request_id),
	CONSTRAINT fk_leases_wrapper_id_wrappers FOREIGN KEY(wrapper_id) REFERENCES wrappers (wrapper_id),
	CONSTRAINT uq_leases_wrapper_id UNIQUE (wrapper_id)
);
INSERT INTO "leases" VALUES('77777777777777777777777777777777','10.0.0.1-0','token-of-a-lease',1760000061.0,1760003665.0,600.0,1760000070.0);
CREATE TABLE machines (
	machine_id TEXT NOT NULL,
	node_id TEXT NOT NULL,
	address TEXT NOT NULL,
	alive BOOLEAN NOT NULL,
	gpus INTEGER NOT NULL,
	gpu_type TEXT,
	memory_bytes BIGINT,
	gpu_memory_bytes BIGINT,
	CONSTRAINT pk_machines PRIMARY KEY (machine_id)
);
INSERT INTO "machines" VALUES('10.0.0.1','node-1','10.0.0.1',1,2,'A100',68719476736,34359738368);
INSERT INTO "machines" VALUES('10.0.0.2','node-2','10.0.0.2',0,0,NULL,NULL,NULL);
CREATE TABLE measurements (
	measurement_id BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	tenant TEXT NOT NULL,
	priority TEXT NOT NULL,
	machine_id TEXT,
	flags TEXT NOT NULL,
	created_s FLOAT NOT NULL, gpu_type TEXT,
	CONSTRAINT pk_measurements PRIMARY KEY (measurement_id)
);
INSERT INTO "measurements" VALUES(41,1,'default','normal',NULL,'[]',1760000000.0,NULL);
INSERT INTO "measurements" VALUES(42,2,'team-a','high','10.0.0.1','["engine_restarted"]',1760000010.0,NULL);
CREATE TABLE requests (
	request_id TEXT NOT NULL,
	measurement_id BIGINT NOT NULL,
	seq BIGINT NOT NULL,
	spec TEXT NOT NULL,
	llmconfig TEXT NOT NULL,
	status TEXT NOT NULL,
	reason TEXT,
	notes TEXT NOT NULL,
	wrapper_id TEXT,
	machine_id TEXT,
	failed_on TEXT NOT NULL,
	overtaken INTEGER NOT NULL,
	created_s FLOAT NOT NULL,
	deploying_s FLOAT,
	deployed_s FLOAT,
	ended_s FLOAT, memory TEXT, model_revision TEXT,
	CONSTRAINT pk_requests PRIMARY KEY (request_id),
	CONSTRAINT fk_requests_measurement_id_measurements FOREIGN KEY(measurement_id) REFERENCES measurements (measurement_id)
);
INSERT INTO "requests" VALUES('11111111111111111111111111111111',41,1,'{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}','{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}','failed','the engine could not start ''Qwen/Qwen2.5-0.5B-Instruct'': out of memory','["torch_dtype: became dtype"]','10.0.0.1-1','10.0.0.1','["10.0.0.1-1", "10.0.0.1-0"]',0,1760000000.0,1760000001.0,NULL,1760000060.0,NULL,NULL);
INSERT INTO "requests" VALUES('77777777777777777777777777777777',42,2,'{"engine_args":"{\"dtype\":\"bfloat16\",\"enforce_eager\":true}","gpus":0,"model":"build/llms/a","modeltyp":"text-generation","revision":null}','{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}','deployed',NULL,'[]','10.0.0.1-0','10.0.0.1','[]',1,1760000010.0,1760000061.0,1760000065.0,NULL,NULL,NULL);
INSERT INTO "requests" VALUES('99999999999999999999999999999999',42,3,'{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}','{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}','queued',NULL,'[]',NULL,NULL,'[]',0,1760000010.0,NULL,NULL,NULL,NULL,NULL);
CREATE TABLE wrappers (
	wrapper_id TEXT NOT NULL,
	machine_id TEXT NOT NULL,
	url TEXT NOT NULL,
	gpus INTEGER NOT NULL,
	status TEXT NOT NULL,
	epoch BIGINT NOT NULL,
	spec TEXT,
	request_id TEXT,
	home TEXT,
	last_used_s FLOAT NOT NULL,
	failures INTEGER NOT NULL,
	reason TEXT,
	CONSTRAINT pk_wrappers PRIMARY KEY (wrapper_id),
	CONSTRAINT fk_wrappers_machine_id_machines FOREIGN KEY(machine_id) REFERENCES machines (machine_id)
);
INSERT INTO "wrappers" VALUES('10.0.0.1-0','10.0.0.1','http://10.0.0.1:8000/wrappers/10.0.0.1-0',1,'leased',7,'{"engine_args":"{\"dtype\":\"bfloat16\",\"enforce_eager\":true}","gpus":0,"model":"build/llms/a","modeltyp":"text-generation","revision":null}','77777777777777777777777777777777','{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}',1760000070.0,0,NULL);
INSERT INTO "wrappers" VALUES('10.0.0.1-1','10.0.0.1','http://10.0.0.1:8000/wrappers/10.0.0.1-1',1,'failed',3,NULL,NULL,NULL,0.0,3,'did not start: no answer');
CREATE INDEX ix_events_request_id_event_id ON events (request_id, event_id);
CREATE INDEX ix_requests_measurement_id ON requests (measurement_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('events',2);
COMMIT;
