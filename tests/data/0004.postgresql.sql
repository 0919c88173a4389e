CREATE TABLE alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE events (
    event_id bigint NOT NULL,
    kind text NOT NULL,
    at_s double precision NOT NULL,
    wrapper_id text,
    request_id text,
    measurement_id bigint,
    cause_id text,
    detail text NOT NULL
);
CREATE SEQUENCE events_event_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE events_event_id_seq OWNED BY events.event_id;
CREATE TABLE forgotten_requests (
    request_id text NOT NULL
);
CREATE TABLE idempotency_keys (
    tenant text NOT NULL,
    key text NOT NULL,
    body_sha256 text NOT NULL,
    request_ids text NOT NULL,
    created_s double precision NOT NULL
);
CREATE TABLE leases (
    request_id text NOT NULL,
    wrapper_id text NOT NULL,
    token text NOT NULL,
    granted_s double precision NOT NULL,
    deadline_s double precision NOT NULL,
    idle_limit_s double precision NOT NULL,
    last_active_s double precision NOT NULL
);
CREATE TABLE machines (
    machine_id text NOT NULL,
    node_id text NOT NULL,
    address text NOT NULL,
    alive boolean NOT NULL,
    gpus integer NOT NULL,
    gpu_type text,
    memory_bytes bigint,
    gpu_memory_bytes bigint
);
CREATE TABLE measurements (
    measurement_id bigint NOT NULL,
    seq bigint NOT NULL,
    tenant text NOT NULL,
    priority text NOT NULL,
    machine_id text,
    flags text NOT NULL,
    created_s double precision NOT NULL,
    gpu_type text
);
CREATE TABLE requests (
    request_id text NOT NULL,
    measurement_id bigint NOT NULL,
    seq bigint NOT NULL,
    spec text NOT NULL,
    llmconfig text NOT NULL,
    status text NOT NULL,
    reason text,
    notes text NOT NULL,
    wrapper_id text,
    machine_id text,
    failed_on text NOT NULL,
    overtaken integer NOT NULL,
    created_s double precision NOT NULL,
    deploying_s double precision,
    deployed_s double precision,
    ended_s double precision,
    memory text,
    model_revision text
);
CREATE TABLE wrappers (
    wrapper_id text NOT NULL,
    machine_id text NOT NULL,
    url text NOT NULL,
    gpus integer NOT NULL,
    status text NOT NULL,
    epoch bigint NOT NULL,
    spec text,
    request_id text,
    home text,
    last_used_s double precision NOT NULL,
    failures integer NOT NULL,
    reason text
);
ALTER TABLE ONLY events ALTER COLUMN event_id SET DEFAULT nextval('events_event_id_seq'::regclass);
INSERT INTO alembic_version VALUES ('0004');
INSERT INTO events VALUES (1, 'LeaseBound', 1760000065, '10.0.0.1-0', NULL, NULL, NULL, '{"epoch": 7}');
INSERT INTO events VALUES (2, 'LeaseUsed', 1760000070, NULL, '77777777777777777777777777777777', NULL, NULL, '{}');
INSERT INTO forgotten_requests VALUES ('00000000000000000000000000000000');
INSERT INTO idempotency_keys VALUES ('team-a', 'key-1', 'abababababababababababababababababababababababababababababababab', '["77777777777777777777777777777777", "99999999999999999999999999999999"]', 1760000010);
INSERT INTO leases VALUES ('77777777777777777777777777777777', '10.0.0.1-0', 'token-of-a-lease', 1760000061, 1760003665, 600, 1760000070);
INSERT INTO machines VALUES ('10.0.0.1', 'node-1', '10.0.0.1', true, 2, 'A100', 68719476736, 34359738368);
INSERT INTO machines VALUES ('10.0.0.2', 'node-2', '10.0.0.2', false, 0, NULL, NULL, NULL);
INSERT INTO measurements VALUES (41, 1, 'default', 'normal', NULL, '[]', 1760000000, NULL);
INSERT INTO measurements VALUES (42, 2, 'team-a', 'high', '10.0.0.1', '["engine_restarted"]', 1760000010, NULL);
INSERT INTO requests VALUES ('11111111111111111111111111111111', 41, 1, '{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}', '{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}', 'failed', 'the engine could not start ''Qwen/Qwen2.5-0.5B-Instruct'': out of memory', '["torch_dtype: became dtype"]', '10.0.0.1-1', '10.0.0.1', '["10.0.0.1-1", "10.0.0.1-0"]', 0, 1760000000, 1760000001, NULL, 1760000060, NULL, NULL);
INSERT INTO requests VALUES ('77777777777777777777777777777777', 42, 2, '{"engine_args":"{\"dtype\":\"bfloat16\",\"enforce_eager\":true}","gpus":0,"model":"build/llms/a","modeltyp":"text-generation","revision":null}', '{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}', 'deployed', NULL, '[]', '10.0.0.1-0', '10.0.0.1', '[]', 1, 1760000010, 1760000061, 1760000065, NULL, NULL, NULL);
INSERT INTO requests VALUES ('99999999999999999999999999999999', 42, 3, '{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}', '{"args":{"deployment":{"torch_dtype":"torch.bfloat16"},"prompting":{"max_new_tokens":32}},"model":"build/llms/a","modeltyp":"text-generation","uses_chat_template":true}', 'queued', NULL, '[]', NULL, NULL, '[]', 0, 1760000010, NULL, NULL, NULL, NULL, NULL);
INSERT INTO wrappers VALUES ('10.0.0.1-0', '10.0.0.1', 'http://10.0.0.1:8000/wrappers/10.0.0.1-0', 1, 'leased', 7, '{"engine_args":"{\"dtype\":\"bfloat16\",\"enforce_eager\":true}","gpus":0,"model":"build/llms/a","modeltyp":"text-generation","revision":null}', '77777777777777777777777777777777', '{"engine_args":"{\"max_model_len\":4096}","gpus":1,"model":"Qwen/Qwen2.5-0.5B-Instruct","modeltyp":"text-generation","revision":"main"}', 1760000070, 0, NULL);
INSERT INTO wrappers VALUES ('10.0.0.1-1', '10.0.0.1', 'http://10.0.0.1:8000/wrappers/10.0.0.1-1', 1, 'failed', 3, NULL, NULL, NULL, 0, 3, 'did not start: no answer');
SELECT pg_catalog.setval('events_event_id_seq', 2, true);
ALTER TABLE ONLY alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY events
    ADD CONSTRAINT pk_events PRIMARY KEY (event_id);
ALTER TABLE ONLY forgotten_requests
    ADD CONSTRAINT pk_forgotten_requests PRIMARY KEY (request_id);
ALTER TABLE ONLY idempotency_keys
    ADD CONSTRAINT pk_idempotency_keys PRIMARY KEY (tenant, key);
ALTER TABLE ONLY leases
    ADD CONSTRAINT pk_leases PRIMARY KEY (request_id);
ALTER TABLE ONLY machines
    ADD CONSTRAINT pk_machines PRIMARY KEY (machine_id);
ALTER TABLE ONLY measurements
    ADD CONSTRAINT pk_measurements PRIMARY KEY (measurement_id);
ALTER TABLE ONLY requests
    ADD CONSTRAINT pk_requests PRIMARY KEY (request_id);
ALTER TABLE ONLY wrappers
    ADD CONSTRAINT pk_wrappers PRIMARY KEY (wrapper_id);
ALTER TABLE ONLY leases
    ADD CONSTRAINT uq_leases_wrapper_id UNIQUE (wrapper_id);
CREATE INDEX ix_events_request_id_event_id ON events USING btree (request_id, event_id);
CREATE INDEX ix_requests_measurement_id ON requests USING btree (measurement_id);
ALTER TABLE ONLY leases
    ADD CONSTRAINT fk_leases_request_id_requests FOREIGN KEY (request_id) REFERENCES requests(request_id);
ALTER TABLE ONLY leases
    ADD CONSTRAINT fk_leases_wrapper_id_wrappers FOREIGN KEY (wrapper_id) REFERENCES wrappers(wrapper_id);
ALTER TABLE ONLY requests
    ADD CONSTRAINT fk_requests_measurement_id_measurements FOREIGN KEY (measurement_id) REFERENCES measurements(measurement_id);
ALTER TABLE ONLY wrappers
    ADD CONSTRAINT fk_wrappers_machine_id_machines FOREIGN KEY (machine_id) REFERENCES machines(machine_id);
