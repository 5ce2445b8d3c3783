BEGIN TRANSACTION;
CREATE TABLE files (
	id VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	content_type VARCHAR NOT NULL, 
	size INTEGER NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	created_at VARCHAR NOT NULL, 
	expires_at VARCHAR NOT NULL, 
	about JSON, 
	PRIMARY KEY (id)
);
INSERT INTO "files" VALUES('hoNM1VljMlj8QjdPYQcfMffnzdl0KxNq','photo.png','image/png',5,'55c64d0fcd6f9d5f7c828093857e3fdfda68478bb4e9bd24d481ef391c7804e8','2026-11-26T05:39:16.517706Z','2126-11-02T05:39:16.529837Z','{"metadata": {"of": "a fox"}}');
INSERT INTO "files" VALUES('YdNV_dgKNZMOclYswbwCutFD3r5p5ifj','output.webp','image/webp',7,'2cea274d0bedc39ec4ab6ba9e59ec889e3ed6fb56a1cf088a64d9b383378dc97','2026-11-26T05:39:16.594081Z','2126-11-02T05:39:16.597994Z',NULL);
INSERT INTO "files" VALUES('9UmH8STHtGe_ZjFe1BaUbL77POAWhKUp','output.webp','image/webp',7,'2cea274d0bedc39ec4ab6ba9e59ec889e3ed6fb56a1cf088a64d9b383378dc97','2026-11-26T05:39:16.714256Z','2126-11-02T05:39:16.715188Z',NULL);
CREATE TABLE fronts (
	id VARCHAR NOT NULL, 
	beat INTEGER NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "fronts" VALUES('front-before',1);
CREATE TABLE predictions (
	id VARCHAR NOT NULL, 
	owner VARCHAR, 
	created_at VARCHAR NOT NULL, 
	request JSON, 
	input JSON NOT NULL, 
	api VARCHAR NOT NULL, 
	model VARCHAR NOT NULL, 
	version VARCHAR NOT NULL, 
	base_url VARCHAR NOT NULL, 
	webhook TEXT, 
	webhook_events JSON NOT NULL, 
	webhook_due BOOLEAN NOT NULL, 
	cancel_requested BOOLEAN NOT NULL, 
	deaths INTEGER NOT NULL, 
	status VARCHAR NOT NULL, 
	output JSON, 
	error TEXT, 
	logs TEXT NOT NULL, 
	metrics JSON NOT NULL, 
	started_at VARCHAR, 
	completed_at VARCHAR, 
	PRIMARY KEY (id)
);
INSERT INTO "predictions" VALUES('cog-waiting','front-before','2026-11-26T05:39:16.546647Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,0,0,'starting',NULL,NULL,'','{}',NULL,NULL);
INSERT INTO "predictions" VALUES('cog-processing','front-before','2026-11-26T05:39:16.566141Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,0,1,'processing',NULL,NULL,'Using seed: 7
 50%|#####     | 2/4','{"seed": 7}','2026-11-26T05:39:16.573657Z',NULL);
INSERT INTO "predictions" VALUES('cog-unwanted','front-before','2026-11-26T05:39:16.585350Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,1,0,'starting',NULL,NULL,'','{}',NULL,NULL);
INSERT INTO "predictions" VALUES('cog-succeeded','front-before','2026-11-26T05:39:16.592082Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,0,0,'succeeded','["/files/YdNV_dgKNZMOclYswbwCutFD3r5p5ifj/output.webp"]',NULL,'Using seed: 7
','{"predict_time": 1.5, "timing": {"denoise": 1.2}}','2026-11-26T05:39:16.598047Z','2026-11-26T05:39:16.598056Z');
INSERT INTO "predictions" VALUES('cog-failed','front-before','2026-11-26T05:39:16.609925Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,0,0,'failed',NULL,'A mask needs an image.','','{"predict_time": 0.1}','2026-11-26T05:39:16.613728Z','2026-11-26T05:39:16.613746Z');
INSERT INTO "predictions" VALUES('cog-canceled','front-before','2026-11-26T05:39:16.617779Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','',NULL,'["start", "output", "logs", "completed"]',0,1,0,'canceled',NULL,NULL,'','{}',NULL,'2026-11-26T05:39:16.629927Z');
INSERT INTO "predictions" VALUES('cog-webhook-due','front-before','2026-11-26T05:39:16.638610Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','cog','','','','http://127.0.0.1:9/hook','["completed"]',1,0,0,'succeeded','[]',NULL,'','{"predict_time": 0.5}','2026-11-26T05:39:16.650181Z','2026-11-26T05:39:16.650217Z');
INSERT INTO "predictions" VALUES('replicate-waiting','front-before','2026-11-26T05:39:16.658159Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,0,0,'starting',NULL,NULL,'','{}',NULL,NULL);
INSERT INTO "predictions" VALUES('replicate-processing','front-before','2026-11-26T05:39:16.666151Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,0,1,'processing',NULL,NULL,'Using seed: 7
 50%|#####     | 2/4','{"seed": 7}','2026-11-26T05:39:16.674057Z',NULL);
INSERT INTO "predictions" VALUES('replicate-unwanted','front-before','2026-11-26T05:39:16.686118Z','{"prompt": "a red fox", "replicate_weights": "https://user:pass@host/lora.safetensors?token=s3cret"}','{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,1,0,'starting',NULL,NULL,'','{}',NULL,NULL);
INSERT INTO "predictions" VALUES('replicate-succeeded','front-before','2026-11-26T05:39:16.702140Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,0,0,'succeeded','["/files/9UmH8STHtGe_ZjFe1BaUbL77POAWhKUp/output.webp"]',NULL,'Using seed: 7
','{"predict_time": 1.5, "timing": {"denoise": 1.2}}','2026-11-26T05:39:16.715223Z','2026-11-26T05:39:16.715229Z');
INSERT INTO "predictions" VALUES('replicate-failed','front-before','2026-11-26T05:39:16.718389Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,0,0,'failed',NULL,'A mask needs an image.','','{"predict_time": 0.1}','2026-11-26T05:39:16.721820Z','2026-11-26T05:39:16.721846Z');
INSERT INTO "predictions" VALUES('replicate-canceled','front-before','2026-11-26T05:39:16.729969Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000',NULL,'["start", "output", "logs", "completed"]',0,1,0,'canceled',NULL,NULL,'','{}',NULL,'2026-11-26T05:39:16.751354Z');
INSERT INTO "predictions" VALUES('replicate-webhook-due','front-before','2026-11-26T05:39:16.761971Z',NULL,'{"prompt": "a red fox", "replicate_weights": "https://host/lora.safetensors"}','replicate','someone/some-model','0000000000000000000000000000000000000000000000000000000000000000','http://127.0.0.1:8000','http://127.0.0.1:9/hook','["completed"]',1,0,0,'succeeded','[]',NULL,'','{"predict_time": 0.5}','2026-11-26T05:39:16.765192Z','2026-11-26T05:39:16.765226Z');
CREATE TABLE secrets (
	name VARCHAR NOT NULL, 
	value VARCHAR NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "secrets" VALUES('webhooks','MfYfSTVg6oPA_iV1Pkeshkb7ONNZ4A9dl53bTssIa_I');
CREATE INDEX ix_predictions_webhook_due ON predictions (webhook_due);
CREATE INDEX ix_predictions_status ON predictions (status);
CREATE INDEX ix_predictions_created_at ON predictions (created_at);
CREATE INDEX ix_predictions_completed_at ON predictions (completed_at);
CREATE INDEX ix_files_expires_at ON files (expires_at);
COMMIT;
